"""The table ``[rectify]``: a criterion and its settings, and the core's others."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ConfigDict, Field, RootModel, model_serializer, model_validator

from dpm_core import (
    Criterion,
    Exchange,
    Hearing,
    LeastResistant,
    RandomRelease,
    SelfRectifying,
    Trajectory,
)

from .classes import built, settings_of

Control = Literal["random", "least-resistant"]
CRITERIA: dict[str, type[Criterion]] = {
    "trajectory": Trajectory,
    "hearing": Hearing,
    "exchange": Exchange,
}
"""The core's criteria, as ``[rectify]`` names them."""
DEFAULT = next(n for n, kind in CRITERIA.items() if isinstance(SelfRectifying().criterion, kind))
"""The name of the core's default."""


class Rectify(RootModel[dict[str, Any]]):
    """Self-Rectifying: ``criterion``, its settings and the core's others, in one table.

    Which keys there are, of what types, within what limits and with what defaults, say
    :class:`~dpm_core.SelfRectifying` and the criteria themselves. A key that is ``None`` is not
    given: a configuration that is written down names all of them.
    """

    model_config = ConfigDict(frozen=True)

    root: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _buildable(self) -> Rectify:
        self.build()
        return self

    @model_serializer
    def _whole(self) -> dict[str, Any]:
        own = (key for kind in CRITERIA.values() for key in settings_of(kind))
        shared = {k: v for k, v in settings_of(SelfRectifying).items() if k != "criterion"}
        return {"criterion": DEFAULT, **dict.fromkeys(own), **shared, **self.root}

    def build(self, control: Control | None = None, seed: int = 0) -> SelfRectifying:
        """The core's settings.

        Args:
            control: release as many as the criterion would, but at random or the least resistant.
            seed: of the random control.

        Raises:
            ValueError: a key, a type or a value is wrong. The message names the key.
        """
        given = {key: value for key, value in self.root.items() if value is not None}
        name = given.pop("criterion", DEFAULT)
        if not isinstance(name, str) or name not in CRITERIA:
            *others, last = map(repr, CRITERIA)
            raise ValueError(f"rectify.criterion is {name!r}; give {', '.join(others)} or {last}")
        kind = CRITERIA[name]
        for key in given:
            if any(key in settings_of(k) for k in CRITERIA.values()) and key not in settings_of(
                kind
            ):
                raise ValueError(f"rectify.{key} is no setting of the criterion {name!r}")
        own = {key: given.pop(key) for key in settings_of(kind) if key in given}
        criterion = built(kind, own, "rectify")
        if control == "random":
            criterion = RandomRelease(criterion, seed)
        elif control == "least-resistant":
            criterion = LeastResistant(criterion)
        return built(SelfRectifying, given, "rectify", criterion=criterion)
