"""Channels are followed through what moves them about, as labels that are moved by hand."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dpm_core.adapters.depgraph import structure_groups
from dpm_core.third_party import graph, tracing
from tests.support.structures import Net

NETWORKS = max(15, int(os.environ.get("DRAWN_NETWORKS", "150")) // 10)
PLACES = 53
"""Positions beside the channels: as many as no layer has channels, or the shapes would not tell."""


@dataclass
class Kind:
    """A layout of tensors: which layer makes them, and where its channels are."""

    layer: Callable[[int, int], nn.Module]
    shape: tuple[int, ...]
    dim: int

    @property
    def example(self) -> Tensor:
        return torch.randn(self.shape, generator=torch.Generator().manual_seed(0))


KINDS = {
    "maps": Kind(lambda i, o: nn.Conv2d(i, o, 1), (2, 3, PLACES, PLACES), 1),
    "lines": Kind(lambda i, o: nn.Conv1d(i, o, 1), (2, 3, PLACES), 1),
    "tokens": Kind(nn.Linear, (2, PLACES, 3), 2),
    "maps with channels last": Kind(nn.Linear, (2, PLACES, PLACES, 3), 3),
    "volumes": Kind(lambda i, o: nn.Conv3d(i, o, 1), (2, 3, PLACES, 2, 2), 1),
    "rows": Kind(nn.Linear, (2, 3), 1),
}
CUTS: dict[str, Callable[[int], slice]] = {
    "front": lambda n: slice(n // 2),
    "back": lambda n: slice(n // 2, None),
    "back, from the end": lambda n: slice(-(n // 2), None),
    "front, from the end": lambda n: slice(0, -(n // 2)),
    "even": lambda n: slice(0, None, 2),
    "odd": lambda n: slice(1, None, 2),
    "first third": lambda n: slice(n // 3),
    "middle third": lambda n: slice(n // 3, -(n // 3)),
    "last third": lambda n: slice(n // 3 * 2, n),
}
TOGETHER = [
    ("front", "back"),
    ("front", "back, from the end"),
    ("back", "front, from the end"),
    ("even", "odd"),
    ("even", "front"),
    ("first third", "middle third", "last third"),
    ("last third", "middle third"),
]


class Uneven(Exception):  # noqa: N818
    """Labels do not go through: a removal took unlike numbers from parts that have to be alike."""


@dataclass
class Labels:
    """What channels a tensor has: for each the labels of those that it is made of."""

    of: list[frozenset[int]]

    def both(self, other: Labels) -> Labels:
        if len(self.of) != len(other.of):
            raise Uneven
        return Labels([a | b for a, b in zip(self.of, other.of, strict=True)])

    def parts(self, number: int) -> list[Labels]:
        if len(self.of) % number:
            raise Uneven
        size = len(self.of) // number
        return [Labels(self.of[k * size : (k + 1) * size]) for k in range(number)]


class Moved(nn.Module):
    """A drawn network in which channels are moved about between layers.

    Attributes:
        steps: what is done to which values: ``(what, values, more)``.
        widths: of each value as it was drawn.
    """

    def __init__(self, kind: Kind, choose: random.Random) -> None:
        super().__init__()
        self.kind, self.choose = kind, choose
        self.steps: list[tuple[str, tuple[int, ...], Any]] = []
        self.widths = [3]
        for _ in range(self.choose.randint(2, 3)):
            self._layer(0)
        for _ in range(self.choose.randint(3, 9)):
            getattr(
                self, self.choose.choice(["_layer", "_cat", "_mix", "_mix", "_cut", "_chunk"])
            )()
        read = {v for _, values, _ in self.steps for v in values}
        for value in range(1, len(self.widths)):
            if value not in read:
                flat, name = self.choose.random() < 0.4, f"layer{len(self.steps)}"
                flat &= self.widths[value] <= 24
                places = math.prod(self.kind.shape[1:]) // 3
                layer = nn.Linear(self.widths[value] * places, 2) if flat else None
                self.add_module(name, layer or self.kind.layer(self.widths[value], 2))
                self._step("head flat" if flat else "head", (value,), name)

    def _step(self, what: str, values: tuple[int, ...], more: Any, *widths: int) -> None:
        self.steps.append((what, values, more))
        self.widths += widths

    def _some(self) -> int:
        return self.choose.randrange(1, len(self.widths))

    def _layer(self, value: int | None = None, out: int | None = None) -> None:
        value = self._some() if value is None else value
        out, name = out or self.choose.choice([4, 6, 8, 12]), f"layer{len(self.steps)}"
        self.add_module(name, self.kind.layer(self.widths[value], out))
        self._step("layer", (value,), name, out)

    def _cat(self) -> None:
        values = tuple(self._some() for _ in range(self.choose.randint(2, 3)))
        total = sum(self.widths[v] for v in values)
        if total < PLACES - 4:
            self._step("cat", values, self.choose.choice([0, len(self.kind.shape)]), total)

    def _mix(self) -> None:
        value = self._some()
        alike = [v for v in range(1, len(self.widths)) if self.widths[v] == self.widths[value]]
        if self.choose.random() < 0.5:
            self._layer(out=self.widths[value])
            alike = [len(self.widths) - 1]
        self._together(value, self.choose.choice(alike))

    def _together(self, *values: int) -> None:
        what = self.choose.choice(["sum", "product"])
        self._step(what, values, None, self.widths[values[0]])

    def _cut(self) -> None:
        value, which = self._some(), self.choose.choice(TOGETHER)
        number = 3 if "third" in which[0] else 2
        if self.widths[value] % number == 0:
            for part in which:
                self._step("cut", (value,), part, self.widths[value] // number)
            for _ in which[1:] if self.choose.random() < 0.7 else ():
                self._together(len(self.widths) - len(which), len(self.widths) - 1)

    def _chunk(self) -> None:
        value = self._some()
        number = self.choose.choice([n for n in (2, 3, 4) if not self.widths[value] % n] or [0])
        if number:
            self._step("chunk", (value,), number, *[self.widths[value] // number] * number)
            for _ in range(number - 1 if self.choose.random() < 0.7 else 0):
                self._together(len(self.widths) - number, len(self.widths) - 1)

    def forward(self, x: Tensor) -> Any:
        values, heads, dim = [x], [], self.kind.dim
        for what, of, more in self.steps:
            given = [values[v] for v in of]
            if what == "layer":
                values.append(torch.tanh(self.get_submodule(more)(given[0])))
            elif what == "cat":
                values.append(torch.cat(given, dim - more))
            elif what == "sum":
                values.append(given[0] + given[1])
            elif what == "product":
                values.append(given[0] * given[1].sigmoid())
            elif what == "cut":
                cut = (slice(None),) * dim + (CUTS[more](given[0].shape[dim]),)
                values.append(given[0][cut])
            elif what == "chunk":
                values += given[0].chunk(more, dim)
            else:
                y = given[0].flatten(1) if what == "head flat" else given[0]
                heads.append(self.get_submodule(more)(y))
        return heads

    # ------------------------------------------------------------------ by hand

    def layers(self) -> Iterator[tuple[str, range]]:
        """The layers that are no heads, and the labels of their channels."""
        first = 0
        for what, _, name in self.steps:
            if what == "layer":
                width = len(self.get_submodule(name).weight)
                yield name, range(first, first + width)
                first += width

    def followed(self, gone: frozenset[int] = frozenset()) -> list[Labels]:
        """The labels of every value, and of what the heads read, without some.

        Raises:
            Uneven: the pass could not be made without them.
        """
        own, values, heads = dict(self.layers()), [Labels([])], []
        for what, of, more in self.steps:
            given = [values[v] for v in of]
            if what == "layer":
                values.append(Labels([frozenset([k]) for k in own[more] if k not in gone]))
            elif what == "cat":
                values.append(Labels([c for labels in given for c in labels.of]))
            elif what in ("sum", "product"):
                values.append(given[0].both(given[1]))
            elif what == "cut":
                values.append(Labels(given[0].of[CUTS[more](len(given[0].of))]))
            elif what == "chunk":
                values += given[0].parts(more)
            else:
                heads.append(given[0])
        return values + heads

    def expected(self) -> dict[frozenset[str], int]:
        """Groups that are the same at zero and removed: their layers, and how many structures."""
        values = self.followed()
        of = {k: k for _, labels in self.layers() for k in labels}

        def root(k: int) -> int:
            while of[k] != k:
                k = of[k]
            return k

        for value in values:
            for labels in value.of:
                for k in labels:
                    of[root(k)] = root(min(labels))
        owner = {k: name for name, labels in self.layers() for k in labels}
        structures: dict[int, set[int]] = {}
        for k in of:
            structures.setdefault(root(k), set()).add(k)
        groups: list[tuple[set[str], list[set[int]]]] = []
        for structure in structures.values():
            names = {owner[k] for k in structure}
            touched = [g for g in groups if g[0] & names]
            groups = [g for g in groups if not g[0] & names]
            merged = names.union(*(g[0] for g in touched))
            groups.append((merged, [s for g in touched for s in g[1]] + [structure]))
        return {
            frozenset(names): len(members)
            for names, members in groups
            if self._alike(members, owner) and self._goes(values, members)
        }

    @staticmethod
    def _alike(members: list[set[int]], owner: dict[int, str]) -> bool:
        return len({tuple(sorted(owner[k] for k in m)) for m in members}) == 1

    def _goes(self, values: list[Labels], members: list[set[int]]) -> bool:
        """Whether what is left goes the same way without some of the structures."""
        if len(members) == 1:
            return False  # nothing would be left
        draw, trials = random.Random(0), [[m] for m in members[:12]]
        trials += [draw.sample(members, draw.randint(1, len(members) - 1)) for _ in trials[:8]]
        for some in trials:
            gone = frozenset[int]().union(*some)
            try:
                left = self.followed(gone)
            except Uneven:
                return False
            if any(
                b.of != [c for c in a.of if not c & gone] for a, b in zip(values, left, strict=True)
            ):
                return False
        return True


def drawn(name: str) -> Iterator[tuple[Moved, dict[frozenset[str], int]]]:
    """Networks with groups, and what these are."""
    for seed in range(NETWORKS):
        torch.manual_seed(seed)
        model = Moved(KINDS[name], random.Random(f"{name} {seed}")).eval()
        expected = model.expected()
        if expected:
            yield model, expected


@pytest.mark.filterwarnings("ignore::dpm_core.adapters.depgraph.LeftUnprunedWarning")
@pytest.mark.parametrize("name", KINDS)
def test_what_goes_together_is_what_labels_say(name):
    met = 0
    for model, expected in drawn(name):
        groups = structure_groups(model, KINDS[name].example, skip_unsupported=True)
        for names, structures in expected.items():
            (group,) = (g for g in groups if g.name in names)
            assert group.size == structures, model.steps
            assert {s.name.partition(".")[0] for s in group.slices} == names, model.steps
            met += group.slices[0].index.shape[1] > 1 or len(names) > 1
    assert met > 4


@pytest.mark.parametrize("name", ["lines", "tokens"])
@pytest.mark.parametrize("halved", [False, True])
def test_slices_are_followed_after_a_removal(name, halved):
    """In the second case what is sliced is a part of a split."""
    kind = KINDS[name]

    def thirds(m: Any, x: Tensor) -> Tensor:
        y, dim = m.a(x), kind.dim
        if halved:
            y = torch.mul(*y.chunk(2, dim))
        n = y.shape[dim] // 3
        first, middle, last = (y.narrow(dim, k * n, n) for k in range(3))
        return m.o(first * middle * last)

    model = Net(thirds, a=kind.layer(3, 12 * (1 + halved)), o=kind.layer(4, 2))
    built = tracing.build(model, kind.example)
    with tracing.upstream(model):
        for left in (4, 3, 2):
            together = [[k + left * part for part in range(3 * (1 + halved))] for k in range(left)]
            every = graph.whole(built, model.a, range(3 * left * (1 + halved)))
            assert graph.members(built, every) == together
            every.prune(together[1])
