"""How far a run is, shown on a terminal only."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

from tqdm import tqdm


class Bar:
    """One bar for all steps of a run, with an estimate of the time that is left for all of them.

    The estimate takes all steps for equally long, those of the dense model and of every stage.

    Args:
        hidden: tqdm's ``disable``.
    """

    def __init__(self, hidden: bool | None = None) -> None:
        self._hidden = hidden
        self._bar: Any = None
        self._before = 0  # steps of loops that are over

    def begin(self, steps: int, done: int, after: int = 0) -> None:
        """A training loop begins, or goes on.

        Args:
            steps: of the loop, in all its stages.
            done: how many of them are done already.
            after: steps of the loops that are to follow.
        """
        if self._bar is not None:
            self._before = self._bar.total - steps - after
            if done and not self._bar.disable:  # they took no time now
                self._bar.initial += done
                self._bar.update(done)
            return
        self._bar = tqdm(
            total=steps + after,
            initial=done,
            unit="step",
            disable=self._hidden,
            leave=False,
            smoothing=0,  # measurements and removals are part of the time that it takes
        )

    def at(self, done: int, stage: str) -> None:
        """So many steps of the present loop are done, in this stage."""
        self._bar.set_description_str(stage, refresh=False)
        self._bar.update(self._before + done - self._bar.n)

    def close(self) -> None:
        """Remove the bar from the terminal."""
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class Spinner:
    """Progress of work between training steps.

    Args:
        hidden: tqdm's ``disable``.
    """

    def __init__(self, hidden: bool | None) -> None:
        self._hidden = hidden
        self._bar: Any = None

    def __call__(self, what: str) -> None:
        """Say what is going on."""
        if self._bar is None:
            self._bar = tqdm(bar_format="{desc} [{elapsed}]", disable=self._hidden, leave=False)
        self._bar.set_description_str(what)
