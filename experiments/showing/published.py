"""Published figures, from one data file with their source: published.toml."""

from __future__ import annotations

import json
import tomllib
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..errors import RunError
from ..record import Variant

PATH = Path(__file__).with_name("published.toml")

Text = Annotated[str, Field(min_length=1)]
Share = Annotated[float, Field(gt=0, le=100)]


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Counterpart(_Table):
    """The runs of this project that a published row corresponds to."""

    framework: Text
    sparse: bool = False
    """With sparse learning."""
    variant: Literal["base", "sp", "sr"]


class Row(_Table):
    """One method's figures, in percent: of the dense network's, and of the test images."""

    method: Text
    reference: int | None = None
    flops: Share
    """Multiply-accumulates, in this project's words."""
    params: Share | None = None
    """``None``: not reported."""
    top1: Share
    counterpart: Counterpart | None = None


class Benchmark(_Table):
    """One published table."""

    name: Text
    network: Text
    data: Text
    rows: Annotated[tuple[Row, ...], Field(min_length=1)]

    def top1(self, framework: str, sparse: bool, variant: Variant) -> float | None:
        """The accuracy of a variant, in percent; ``None`` where none is published."""
        for row in self.rows:
            ours = row.counterpart
            if ours and (ours.framework, ours.sparse, ours.variant) == (framework, sparse, variant):
                return row.top1
        return None


class Published(_Table):
    """All published tables."""

    source: Text
    note: Text
    references: dict[str, Text]
    benchmarks: Annotated[tuple[Benchmark, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _consistent(self) -> Published:
        rows = [row for benchmark in self.benchmarks for row in benchmark.rows]
        for row in rows:
            if row.reference is not None and str(row.reference) not in self.references:
                raise ValueError(
                    f"{row.method} cites {row.reference}, which [references] does not have"
                )
        counted = Counter(row.counterpart for row in rows if row.counterpart is not None)
        for counterpart, times in counted.items():
            if times > 1:
                raise ValueError(f"{times} rows are the counterpart of {counterpart}; one may be")
        return self

    def benchmark(self, framework: str, sparse: bool) -> Benchmark | None:
        """The table with a framework's own figures; ``None`` where none is published."""
        for benchmark in self.benchmarks:
            if benchmark.top1(framework, sparse, "base") is not None:
                return benchmark
        return None


@cache
def load(path: Path = PATH) -> Published:
    """Read and check the published figures.

    Raises:
        RunError: the file cannot be read, or a key, a type, a range or a reference is wrong.
    """
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
        # Strict JSON mode takes lists for tuples and whole numbers for floats, and nothing else.
        return Published.model_validate_json(json.dumps(raw, default=str), strict=True)
    except OSError as cause:
        raise RunError(f"cannot read {path}: {cause.strerror}") from cause
    except ValidationError as cause:
        errors = cause.errors(include_url=False)
        lines = (f"{'.'.join(map(str, e['loc']))}: {e['msg']}".removeprefix(": ") for e in errors)
        raise RunError(f"{path} has wrong figures: {'; '.join(lines)}; correct them") from cause
    except ValueError as cause:
        raise RunError(f"{path} is not TOML: {cause}; correct it") from cause
