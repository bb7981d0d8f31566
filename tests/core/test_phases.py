"""The table of phases, written down a second time and exhausted."""

from __future__ import annotations

import pytest
import torch

from dpm_core.phases import Move, Phase, after

ACTIVE, DECAYING, PRUNED = "ACTIVE", "DECAYING", "PRUNED"

EXPECTED: dict[tuple[str, str], str | None] = {
    (ACTIVE, "START"): DECAYING,
    (ACTIVE, "VANISH"): PRUNED,
    (ACTIVE, "RELEASE"): None,
    (ACTIVE, "FINISH"): None,
    (DECAYING, "START"): None,
    (DECAYING, "VANISH"): None,
    (DECAYING, "RELEASE"): ACTIVE,
    (DECAYING, "FINISH"): PRUNED,
    (PRUNED, "START"): None,
    (PRUNED, "VANISH"): None,
    (PRUNED, "RELEASE"): None,
    (PRUNED, "FINISH"): None,
}


def test_the_expectation_covers_every_phase_and_every_move() -> None:
    assert set(EXPECTED) == {(p.name, m.name) for p in Phase for m in Move}


@pytest.mark.parametrize(("phase", "move"), EXPECTED)
def test_every_pair_moves_as_expected_or_is_refused(phase: str, move: str) -> None:
    result = int(after(torch.tensor([Phase[phase]]), Move[move]))
    expected = EXPECTED[phase, move]
    assert result == (-1 if expected is None else Phase[expected])


@pytest.mark.parametrize("move", Move)
def test_phases_of_any_shape_move_element_by_element(move: Move) -> None:
    phases = torch.tensor([[0, 1, 2], [2, 1, 0]])
    one_by_one = [[int(after(torch.tensor([p]), move)) for p in row] for row in phases.tolist()]
    assert after(phases, move).tolist() == one_by_one


def test_the_numbers_of_phases_are_those_in_saved_states() -> None:
    assert {p.name: int(p) for p in Phase} == {"ACTIVE": 0, "DECAYING": 1, "PRUNED": 2}
