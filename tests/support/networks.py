"""Drawn networks: a seed gives a small network of the layers and operations that people use.

A network is a program of steps on registers, as plain data, and the layers it names. The drawing
knows nothing of pruning; it only follows how often people write a thing. Most of what it draws
adapts to the number of channels (``x.chunk(2, 1)``), some does not (``x.split([3, 5], 1)``).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

WIDTHS = (4, 6, 8, 12)
TOKENS = 11
"""How many different tokens an embedding knows."""


@dataclass(frozen=True)
class Step:
    """One line of a program: the next register is ``op`` of other registers."""

    op: str
    args: tuple[int, ...]
    settings: Mapping[str, Any]

    def __str__(self) -> str:
        given = [f"r{a}" for a in self.args] + [f"{k}={v!r}" for k, v in self.settings.items()]
        return f"{self.op}({', '.join(given)})"


class Network(nn.Module):
    """Runs a program.

    Args:
        program: its steps; the registers begin with the inputs.
        layers: modules and bare parameters, by the names that the program gives them.
        result: (form, registers): what is returned.
    """

    def __init__(
        self,
        program: Sequence[Step],
        layers: Mapping[str, nn.Module | nn.Parameter],
        result: tuple[str, tuple[int, ...]],
    ) -> None:
        super().__init__()
        self.program, self.result, self.inputs = list(program), result, 1
        for name, layer in layers.items():
            self.add(name, layer)

    def add(self, name: str, layer: nn.Module | nn.Parameter) -> None:
        if isinstance(layer, nn.Parameter):
            self.register_parameter(name, layer)
        else:
            self.add_module(name, layer)

    def forward(self, *given: Any, **named: Any) -> Any:
        registers = [*given, *named.values()]
        for step in self.program:
            registers.append(self.do(step, registers))
        form, wanted = self.result
        return FORMS[form](*[registers[i] for i in wanted])

    def do(self, step: Step, registers: Sequence[Any]) -> Any:
        settings = dict(step.settings)
        if "layer" in settings:
            settings["layer"] = getattr(self, settings["layer"])
        return OPERATIONS[step.op](*[registers[a] for a in step.args], **settings)

    def __str__(self) -> str:
        lines = [f"  {n} = {m}" for n, m in self.named_children()]
        lines += [f"  {n}: {tuple(p.shape)}" for n, p in self.named_parameters(recurse=False)]
        lines += [f"  r{self.inputs + i} = {step}" for i, step in enumerate(self.program)]
        return "\n".join([*lines, f"  return {self.result[0]} of {self.result[1]}"])


# ---------------------------------------------------------------------- what programs can do


def _shuffle(x: Tensor, parts: int, fixed: int = 0) -> Tensor:
    n, c, h, w = x.shape
    return x.view(n, parts, (fixed or c) // parts, h, w).transpose(1, 2).reshape(n, -1, h, w)


def _grouped(x: Tensor, parts: int, last: bool, how: str) -> Tensor:
    """The channels in ``parts``, or in runs of ``parts``, of which one is left."""
    sizes, dim = ((-1, parts), 2) if last else ((parts, -1), 1)
    x = x.unflatten(1, sizes)
    return x.amax(dim) if how == "amax" else getattr(x, how)(dim)


def _slice(x: Tensor, dim: int, start: float, end: float, step: int) -> Tensor:
    """Bounds are shares of the channels where they are floats."""
    count = x.shape[dim]
    bounds = [int(b * count) if isinstance(b, float) else b for b in (start, end)]
    return x[(slice(None),) * (dim % x.dim()) + (slice(*bounds, step),)]


def _heads(q: Tensor, k: Tensor, v: Tensor, heads: int, size: int) -> Tensor:
    """Attention over tokens, with so many heads, or of so many channels."""
    form = (-1, size) if size else (heads, -1)
    q, k, v = (t.unflatten(-1, form).transpose(1, 2) for t in (q, k, v))
    weights = (q @ k.transpose(-1, -2) / 2).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)


def _weighted(*xs: Tensor, layer: Tensor, form: str) -> Tensor:
    """A sum with learnt weights, as feature pyramids write it."""
    if form == "relu":
        layer = functional.relu(layer)
        layer = layer / (layer.sum() + 1e-3)
    weights = layer.softmax(0).unbind() if form == "softmax" else list(layer)
    return sum((w * x for w, x in zip(weights[1:], xs[1:], strict=True)), weights[0] * xs[0])


def _pyramid(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """A spatial pyramid: pooled to several sizes, side by side."""
    pool = functional.adaptive_avg_pool2d if x.dim() == 4 else functional.adaptive_max_pool1d
    return torch.cat([pool(x, size).flatten(1) for size in sizes], 1)


def _permuted(x: Tensor) -> Tensor:
    return x.permute(0, *range(2, x.dim()), 1).flatten(1)


def _unit(name: str, x: Tensor) -> Tensor:
    return getattr(functional, name)(x) if hasattr(functional, name) else getattr(torch, name)(x)


OPERATIONS: dict[str, Callable[..., Any]] = {
    "call": lambda *xs, layer: layer(*xs),
    "scale": lambda x, layer: x * layer,
    "shift": lambda x, layer: x + layer,
    "unit": lambda x, name: _unit(name, x),
    "softmax": lambda x, dim: x.softmax(dim),
    "normalize": lambda x, dim: functional.normalize(x, dim=dim),
    "centre": lambda x, dim: x - x.mean(dim, keepdim=True),
    "cumsum": lambda x, dim: x.cumsum(dim),
    "flip": lambda x, dim: x.flip(dim),
    "roll": lambda x, dim: x.roll(1, dim),
    "repeat": lambda x, dim: torch.cat([x, x], dim),
    "interleave": lambda x, dim: x.repeat_interleave(2, dim),
    "pad": lambda x, dim: functional.pad(x, (0, 0) * (x.dim() - 1 - dim % x.dim()) + (1, 1)),
    "pick": lambda x, dim, index: x.index_select(dim, torch.tensor(index)),
    "chunk": lambda x, parts, dim: x.chunk(parts, dim),
    "split": lambda x, sizes, dim: x.split(
        [x.shape[dim] // 4, x.shape[dim] - x.shape[dim] // 4] if sizes is None else sizes, dim
    ),
    "slice": _slice,
    "item": lambda xs, number: xs[number],
    "last": lambda x: x[:, -1],
    "state": lambda xs: (xs[1][0] if isinstance(xs[1], tuple) else xs[1])[-1],
    "sum": lambda *xs: sum(xs[1:], xs[0]),
    "minus": lambda x, y: x - y,
    "product": lambda x, y: x * y,
    "weighted": _weighted,
    "maximum": torch.maximum,
    "quotient": lambda x, y: x / (1 + y.square()),
    "cat": lambda *xs, dim: torch.cat(xs, dim),
    "stack": lambda *xs: torch.stack(xs, 2).flatten(1, 2),
    "glu": lambda x, dim: functional.glu(x, dim),
    "mean over channels": lambda x: x.mean(1, keepdim=True),
    "greatest channel": lambda x: x.amax(1, keepdim=True),
    "mean over places": lambda x: x.mean(tuple(range(2, x.dim()))),
    "mean over tokens": lambda x: x.mean(1),
    "kept mean": lambda x: x.mean(tuple(range(2, x.dim())), keepdim=True),
    "max pool": lambda x: functional.max_pool2d(x, 2),
    "average pool": lambda x: functional.avg_pool2d(x, 2),
    "upsample": lambda x: functional.interpolate(x, scale_factor=2.0),
    "flatten": lambda x: x.flatten(1),
    "view": lambda x, size: x.contiguous().view(x.shape[0], size),
    "flatten permuted": _permuted,
    "pyramid": _pyramid,
    "maps": lambda x, places: x.unflatten(1, (-1, *places)),
    "fixed maps": lambda x, sizes: x.reshape(x.shape[0], *sizes),
    "tokens": lambda x: x.flatten(2).transpose(1, 2),
    "tokens last": lambda x: x.flatten(2),
    "maps of tokens": lambda x, places: x.transpose(1, 2).unflatten(2, places),
    "swap": lambda x: x.transpose(1, 2),
    "shuffle": _shuffle,
    "grouped": _grouped,
    "pixel shuffle": lambda x: functional.pixel_shuffle(x, 2),
    "pixel unshuffle": lambda x: functional.pixel_unshuffle(x, 2),
    "heads": _heads,
    "gram": lambda x: x.flatten(2) @ x.flatten(2).transpose(1, 2),
    "detach": lambda x: x.detach(),
    "wide": lambda x: x[(...,) + (None,) * 2],
}

FORMS: dict[str, Callable[..., Any]] = {
    "tensor": lambda x: x,
    "tuple": lambda *xs: xs,
    "with None": lambda *xs: (None, *xs),
    "list in tuple": lambda x, *xs: (x, list(xs)),
    "dict": lambda *xs: {f"out{i}": x for i, x in enumerate(xs)} | {"loss": None, "size": 3},
    "scores and numbers": lambda x, *xs: (x, x.argmax(1), *xs),
}


# ---------------------------------------------------------------------- drawing them


@dataclass
class Drawn:
    """A drawn network, and its inputs.

    Attributes:
        model: in double precision, its weights and statistics drawn.
        inputs: of a seed and a number of samples.
    """

    seed: int
    model: Network
    inputs: Callable[[int, int], Any]

    @property
    def example(self) -> Any:
        return self.inputs(0, 2)


def draw(seed: int, norm: bool = False, plain: bool = False, group_norm: bool = False) -> Drawn:
    """The network of a seed.

    Args:
        seed: any.
        norm: a BatchNorm behind every convolution and linear layer.
        plain: images in, one tensor of scores out, and fewer odd things between them.
        group_norm: most BatchNorms are GroupNorms instead.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        return _Drawing(random.Random(seed), seed, norm, plain, group_norm).drawn()


class _Drawing:
    """A network while it is drawn: every step runs at once, so that shapes are known."""

    def __init__(
        self, choose: random.Random, seed: int, norm: bool, plain: bool, group_norm: bool
    ) -> None:
        self.choose, self.seed, self.norm, self.plain = choose, seed, norm, plain
        self.group_norm = group_norm
        self.net = Network([], {}, ("tensor", ()))
        self.values: list[Any] = []
        self.kinds: dict[int, str] = {}  # maps (N, C, H, W), line (N, C, L), tokens (N, T, C), flat
        self.kept: list[int] = []  # registers to come back to

    # -------------------------------------------------------------- small things

    def chance(self, share: float) -> bool:
        return self.choose.random() < share

    def some(self, *those: Any) -> Any:
        return self.choose.choice(those)

    def do(self, op: str, *args: int, kind: str | None = None, **settings: Any) -> int:
        step = Step(op, args, settings)
        value = self.net.do(step, self.values)
        self.net.program.append(step)
        self.values.append(value)
        number = len(self.values) - 1
        if isinstance(value, Tensor):
            self.kinds[number] = kind or self.kinds.get(args[0], "flat")
        return number

    def add(self, what: str, layer: nn.Module | nn.Parameter) -> str:
        name = f"{what}{sum(n.startswith(what) for n in self.names())}"
        if isinstance(layer, nn.Module):
            _wake(layer.double())
        self.net.add(name, layer)
        return name

    def names(self) -> list[str]:
        return [n for n, _ in self.net.named_children()] + [
            n for n, _ in self.net.named_parameters(recurse=False)
        ]

    def layer(self, what: str, layer: nn.Module, *args: int, kind: str | None = None) -> int:
        return self.do("call", *args, kind=kind, layer=self.add(what, layer))

    def kind(self, r: int) -> str:
        return self.kinds[r]

    def dim(self, r: int) -> int:
        return -1 if self.kind(r) == "tokens" else 1

    def width(self, r: int) -> int:
        return int(self.values[r].shape[self.dim(r)])

    def places(self, r: int) -> tuple[int, ...]:
        return tuple(self.values[r].shape[2:])

    def parts(self, count: int) -> int:
        """A number of parts, above 1 where there is one."""
        divisors = [g for g in (2, 3, 4) if count % g == 0]
        return self.choose.choice(divisors) if divisors else 1

    # -------------------------------------------------------------- layers with weights

    def mix(self, r: int, out: int | None = None, size: int | None = None) -> int:
        """A convolution or linear layer, of all channels."""
        out = out or self.some(*WIDTHS)
        kind, width = self.kind(r), self.width(r)
        bias = self.chance(0.7)
        if kind in ("flat", "tokens"):
            layer: nn.Module = nn.Linear(width, out, bias)
            what = "linear"
        else:
            size = size or self.some(1, 3, 3)
            of = nn.Conv2d if kind == "maps" else nn.Conv1d
            layer, what = of(width, out, size, padding=size // 2, bias=bias), "conv"
        twin = self._twin(layer) if self.chance(0.15) else None
        if twin is not None and self.chance(0.5):
            return self._normed(self.do("call", r, layer=twin))
        if twin is not None:
            layer.double()
            name = self.add(what, layer)
            layer.weight = getattr(self.net, twin).weight
            return self._normed(self.do("call", r, layer=name))
        return self._normed(self.layer(what, layer, r))

    def _twin(self, layer: nn.Module) -> str | None:
        """An earlier layer of the same kind and sizes."""
        alike = [n for n, m in self.net.named_children() if str(m) == str(layer)]
        return self.choose.choice(alike) if alike else None

    def _normed(self, r: int) -> int:
        return self.batch_norm(r) if self.norm and self.kind(r) != "tokens" else r

    def batch_norm(self, r: int) -> int:
        if self.group_norm and self.chance(0.7):
            width, places = self.width(r), self.values[r][0, 0].numel()
            groups = self.some(*(g for g in range(1, width + 1) if width % g == 0))
            if width // groups * places > 1:
                return self.layer("norm", nn.GroupNorm(groups, width, affine=self.chance(0.8)), r)
        of = nn.BatchNorm2d if self.kind(r) == "maps" else nn.BatchNorm1d
        norm = of(self.width(r))
        if self.chance(0.15):
            norm.register_parameter("bias", None)
        return self.layer("norm", norm, r)

    def grouped(self, r: int) -> int:
        width, kind = self.width(r), self.kind(r)
        if kind not in ("maps", "line"):
            return self.mix(r)
        of = nn.Conv2d if kind == "maps" else nn.Conv1d
        groups = width if self.chance(0.5) else self.parts(width)
        out = width * (self.some(1, 1, 1, 2) if groups == width else 1)
        if groups < width and self.chance(0.5):
            out = groups * self.some(2, 3, 4)
        layer = of(width, out, 3, padding=1, groups=groups, bias=self.chance(0.5))
        return self._normed(self.layer("grouped", layer, r))

    def transposed(self, r: int) -> int:
        width, kind = self.width(r), self.kind(r)
        if kind not in ("maps", "line"):
            return self.mix(r)
        of = nn.ConvTranspose2d if kind == "maps" else nn.ConvTranspose1d
        groups = self.some(1, 1, width, self.parts(width))
        out = groups * self.some(1, 2) if groups > 1 else self.some(*WIDTHS)
        layer = of(width, out, 3, padding=1, groups=groups, bias=self.chance(0.5))
        return self._normed(self.layer("transposed", layer, r))

    def normalised(self, r: int) -> int:
        width, kind, dim = self.width(r), self.kind(r), self.dim(r)
        if kind == "tokens":
            if self.chance(0.2):
                return self.layer("norm", nn.RMSNorm(width), r)
            return self.layer("norm", nn.LayerNorm(width), r)
        drawn = self.choose.random()
        if drawn < 0.6:
            return self.batch_norm(r)
        if drawn < 0.65:
            of = nn.BatchNorm2d if kind == "maps" else nn.BatchNorm1d
            return self.layer("norm", of(width, affine=False), r)
        if kind == "flat":
            return self.layer("norm", nn.LayerNorm(width), r)
        if drawn < 0.8:
            places = self.values[r][0, 0].numel()
            if places == 1:
                return r
            ofs = nn.InstanceNorm2d if kind == "maps" else nn.InstanceNorm1d
            affine, track = self.chance(0.6), self.chance(0.4)
            norm = ofs(width, affine=affine, track_running_stats=track)
            if self.chance(0.3):
                norm.register_parameter("bias", None)
            return self.layer("norm", norm, r)
        if drawn < 0.9:
            return self.layer("norm", nn.GroupNorm(self.some(1, self.parts(width)), width), r)
        if kind == "maps" and drawn < 0.97:
            return self.layer("norm", nn.LocalResponseNorm(3), r)
        return self.do("normalize", r, dim=dim)

    def active(self, r: int) -> int:
        if self.chance(0.1):
            return self.layer("prelu", nn.PReLU(self.width(r) if self.dim(r) == 1 else 1), r)
        if self.chance(0.12):
            return self.do("unit", r, name=self.some("sigmoid", "softplus", "cos"))
        smooth = ("relu", "relu", "relu", "gelu", "silu", "tanh", "hardswish", "leaky_relu", "elu")
        return self.do("unit", r, name=self.some(*smooth))

    def bare(self, r: int) -> int:
        shape = (self.width(r),) + ((1,) * (self.values[r].dim() - 2) if self.dim(r) == 1 else ())
        if self.chance(0.3):
            shape = (1, *shape) if self.dim(r) == 1 else shape
        if self.chance(0.15):
            shape = ()
        op = self.some("scale", "scale", "shift")
        bare = self.net.named_parameters(recurse=False)
        twins = [n for n, p in bare if p.shape == shape and n.startswith(op)]
        if twins and self.chance(0.3):
            return self.do(op, r, layer=self.some(*twins))
        value = nn.Parameter(torch.rand(shape, dtype=torch.float64) + 0.5)
        return self.do(op, r, layer=self.add(op, value))

    # -------------------------------------------------------------- several layers

    def block(self, r: int) -> int:
        """The ordinary case."""
        r = self.mix(r)
        if self.chance(0.5):
            r = self.normalised(r)
        return self.active(r)

    def residual(self, r: int) -> int:
        inner = self.block(r)
        if self.chance(0.3):
            inner = self.grouped(inner)
        inner = self.mix(inner, self.width(r))
        if self.chance(0.5):
            inner = self.normalised(inner)
        if self.values[inner].shape != self.values[r].shape:
            return inner
        op = self.some("sum", "sum", "sum", "sum", "product", "maximum", "minus")
        r = self.do(op, r, inner)
        return self.active(r) if self.chance(0.5) else r

    def parallel(self, r: int) -> int:
        """Two or three branches, joined."""
        if self.chance(0.5):
            out = [self.mix(r) for _ in range(self.some(2, 2, 3))]
            out = [self.active(o) if self.chance(0.4) else o for o in out]
            if self.chance(0.2):
                out.append(r)
            return self.do("cat", *out, dim=self.dim(r))
        width = self.some(*WIDTHS)
        out = [self.mix(r, width) for _ in range(2)]
        if self.chance(0.5):
            out[1] = self.active(out[1])
        op = self.some("sum", "product", "maximum", "quotient", "weighted")
        if op == "weighted":
            weights = self.add("mixing", nn.Parameter(torch.rand(2, dtype=torch.float64) + 0.5))
            form = self.some("plain", "relu", "softmax")
            return self.do(op, *out, layer=weights, form=form)
        return self.do(op, *out)

    def halves(self, r: int) -> int:
        """Channels taken apart, and put together in one way or another."""
        dim = self.dim(r)
        count = self.parts(self.width(r))
        if count == 1:
            return self.mix(r)
        form = self.choose.random()
        if form < 0.5:
            apart = self.do("chunk", r, parts=count, dim=dim)
        elif form < 0.6:
            sizes, count = [self.width(r) // count] * count, count
            apart = self.do("split", r, sizes=sizes, dim=dim)
        elif form < 0.8:
            first = self.choose.randint(1, self.width(r) - 1)
            sizes = (
                None if self.width(r) > 3 and self.chance(0.6) else [first, self.width(r) - first]
            )
            apart, count = self.do("split", r, sizes=sizes, dim=dim), 2
        else:
            return self._sliced(r)
        kind = self.kind(r)
        parts = [self.do("item", apart, kind=kind, number=i) for i in range(count)]
        return self._joined(parts, dim)

    def _sliced(self, r: int) -> int:
        dim, c = self.dim(r), self.width(r)
        half = c // 2
        bounds: Any = self.some(
            ((0.0, 0.5, 1), (0.5, 1.0, 1)), ((0.0, 0.5, 1), (0.5, 1.0, 1)),
            ((0, half, 1), (half, 2 * half, 1)), ((0, c, 2), (1, c, 2)),
            ((0.0, 1.0, 2), (1, 1.0, 2)),
            ((1, c, 1), (0, c - 1, 1)), ((0.25, 0.75, 1), (0.0, 0.5, 1)),
        )  # fmt: skip
        parts = [self.do("slice", r, dim=dim, start=a, end=b, step=s) for a, b, s in bounds]
        if self.chance(0.2):
            return parts[0]
        return self._joined(parts, dim)

    def _joined(self, parts: list[int], dim: int) -> int:
        if self.chance(0.3):
            changed = self.choose.randrange(len(parts))
            width = self.width(parts[changed])
            parts[changed] = self.some(
                lambda p: self.mix(p, width), lambda p: self.mix(p), self.active, self.normalised
            )(parts[changed])
        same = len({self.values[p].shape for p in parts}) == 1
        form = self.choose.random()
        if not same or form < 0.3:
            if form < 0.1:
                parts = parts[::-1]
            if form > 0.27:
                parts = parts[1:]
            return parts[0] if len(parts) == 1 else self.do("cat", *parts, dim=dim)
        if form < 0.45:
            return self.do("sum", *parts)
        if form < 0.6:
            return self.do(self.some("product", "maximum", "minus", "quotient"), *parts[:2])
        if form < 0.8:
            gate = self.do("unit", parts[1], name=self.some("sigmoid", "tanh", "gelu"))
            return self.do("product", parts[0], gate)
        if form < 0.9:
            width = self.some(*WIDTHS)
            return self.do("sum", *[self.mix(p, width) for p in parts])
        if form < 0.95:
            inner = self.mix(parts[-1], self.width(parts[-1]))
            return self.do("cat", *parts, inner, dim=dim)
        return self.choose.choice(parts)

    def gated(self, r: int) -> int:
        """Squeeze and excite, and other gates."""
        dim, width, kind = self.dim(r), self.width(r), self.kind(r)
        form = self.choose.random()
        if kind in ("maps", "line") and form < 0.4:
            gate = self.do("kept mean", r)
            gate = self.mix(gate, self.some(2, 4), 1)
            gate = self.mix(self.active(gate), width, 1)
            name = self.some("sigmoid", "sigmoid", "hardsigmoid", "tanh", "relu")
            return self.do("product", r, self.do("unit", gate, name=name))
        if kind in ("maps", "line") and form < 0.5:
            over = self.do(self.some("mean over channels", "greatest channel"), r)
            gate = self.do("unit", self.mix(over, 1, 1), name="sigmoid")
            return self.do("product", r, gate)
        if width % 2 == 0 and form < 0.7:
            return self.do("glu", r, dim=dim)
        if form < 0.8:
            return self.do("product", r, self.do("softmax", r, dim=dim))
        gate = self.mix(r, width)
        name = self.some("sigmoid", "tanh")
        return self.do("product", r, self.do("unit", gate, name=name))

    def odd(self, r: int) -> int:
        """What mixes, moves or repeats channels without weights."""
        dim, c, kind = self.dim(r), self.width(r), self.kind(r)
        ops = ["softmax", "centre", "cumsum", "flip", "roll", "repeat", "interleave", "normalize"]
        if kind != "flat":
            ops.append("pad")
        op = self.some(*ops, "pick", "lrn")
        if op == "pick":
            return self.do("pick", r, dim=dim, index=self.choose.sample(range(c), (c + 1) // 2))
        if op == "lrn":
            return self.layer("norm", nn.LocalResponseNorm(3), r) if kind in ("maps", "line") else r
        return self.do(op, r, dim=dim)

    def reshaped(self, r: int) -> int:
        """Maps, whose channels move by a reshape."""
        kind, c = self.kind(r), self.width(r)
        if kind == "tokens":
            return self.attention(r)
        if kind == "flat":
            places = (2, 2) if c % 4 == 0 and self.chance(0.5) else (1, 1)
            if self.chance(0.2):
                sizes = (c // (places[0] * places[1]), *places)
                return self.do("fixed maps", r, kind="maps", sizes=sizes)
            return self.do("maps", r, kind="maps", places=places)
        parts = self.parts(c)
        form = self.choose.random()
        if kind == "maps" and form < 0.3 and parts > 1:
            fixed = c if self.chance(0.3) else 0
            return self.do("shuffle", r, parts=parts, fixed=fixed)
        if form < 0.6 and parts > 1:
            how = self.some("sum", "mean", "amax")
            return self.do("grouped", r, parts=parts, last=self.chance(0.5), how=how)
        if kind == "maps" and form < 0.75 and c % 4 == 0:
            return self.do("pixel shuffle", r)
        h = self.values[r].shape[-1]
        if kind == "maps" and form < 0.85 and h % 2 == 0:
            return self.do("pixel unshuffle", r)
        if kind == "maps" and form < 0.9:
            return self.do("swap", r)
        if kind == "maps":
            tokens = self.tokened(r)
            tokens = self.block(tokens)
            return self.do("maps of tokens", tokens, kind="maps", places=self.places(r))
        return self.do("swap", r, kind="tokens")

    def tokened(self, r: int) -> int:
        return self.do("tokens", r, kind="tokens")

    def attention(self, r: int) -> int:
        width = self.width(r)
        heads = self.parts(width)
        if self.chance(0.3):
            name = self.add("attention", nn.MultiheadAttention(width, heads, batch_first=True))
            both = self.do("call", r, r, r, layer=name)
            return self.do("sum", r, self.do("item", both, kind="tokens", number=0))
        inner = heads * self.some(1, 2)
        q, k, v = (self.mix(r, inner) for _ in range(3))
        size = inner // heads if self.chance(0.5) else 0
        out = self.do("heads", q, k, v, kind="tokens", heads=heads, size=size)
        out = self.mix(out, width)
        return self.do("sum", r, out) if self.chance(0.7) else out

    def recurrent(self, r: int) -> int:
        of = self.some(nn.LSTM, nn.GRU, nn.RNN)
        layer = of(
            self.width(r), self.some(3, 4), batch_first=True, bidirectional=self.chance(0.3),
            num_layers=self.some(1, 1, 2),
        )  # fmt: skip
        both = self.do("call", r, layer=self.add("recurrent", layer))
        if self.chance(0.3):
            return self.do("state", both, kind="flat")
        out = self.do("item", both, kind="tokens", number=0)
        return self.do("last", out, kind="flat") if self.chance(0.5) else out

    def resized(self, r: int) -> int:
        h = self.values[r].shape[-1]
        if self.kind(r) != "maps" or h < 4:
            return r
        return self.do(self.some("max pool", "average pool"), r)

    def back(self, r: int) -> int:
        """An earlier register joins in."""
        dim = self.dim(r)
        same = [k for k in self.kept if self.values[k].shape == self.values[r].shape and k != r]
        like = [
            k for k in self.kept if self.kind(k) == self.kind(r) and k != r and self._fits(k, r)
        ]
        if same and self.chance(0.6):
            return self.do(self.some("sum", "sum", "product", "maximum"), r, self.some(*same))
        if like:
            k = self.some(*like)
            if self.chance(0.3):
                return self.do("sum", r, self.mix(k, self.width(r)))
            return self.do("cat", *self.choose.sample([r, k], 2), dim=dim)
        return self.residual(r)

    def _fits(self, a: int, b: int) -> bool:
        one, other = list(self.values[a].shape), list(self.values[b].shape)
        dim = self.dim(a)
        one[dim] = other[dim] = 0
        return one == other and self.width(a) + self.width(b) <= 40

    # -------------------------------------------------------------- whole networks

    def start(self) -> int:
        """The inputs, and what comes of them."""
        form = 0.0 if self.plain else self.choose.random()
        if form < 0.7:
            shapes: list[tuple[int, ...]] = [(3, 4, 4)]
            if not self.plain and self.chance(0.15):
                shapes.append(self.some((3, 4, 4), (2, 4, 4), (5,)))
        elif form < 0.8:
            shapes = [(3, 6)]
        elif form < 0.9:
            shapes = [(5,)]
        else:
            shapes = [()]  # numbers of tokens
        self.mapped = self.chance(0.1) and not self.plain
        self.shapes = shapes
        given = self.inputs(0, 2)
        for value in given.values() if self.mapped else given:
            self.values.append(value)
            self.kinds[len(self.values) - 1] = {4: "maps", 3: "line", 2: "flat"}[value.dim()]
        self.net.inputs = len(self.values)
        if shapes == [()]:
            width = self.some(4, 6, 8)
            name = self.add("embedding", nn.Embedding(TOKENS, width))
            return self.do("call", 0, kind="tokens", layer=name)
        r = self.block(0)
        if len(shapes) > 1:
            if shapes[1] == (5,):
                other = self.mix(1, self.width(r))
                other = self.do("wide", other, kind="maps")
                return self.do(self.some("product", "sum"), r, other)
            if shapes[1] == (3, 4, 4) and self.chance(0.5):
                return self._siamese(r)
            other = self.mix(1, self.width(r))
            if self.values[other].shape == self.values[r].shape and self.chance(0.5):
                return self.do(self.some("sum", "product"), r, other)
            return self.do("cat", r, other, dim=1)
        return r

    def _siamese(self, r: int) -> int:
        """The second input goes through the first one's layers."""
        first = next(s for s in self.net.program if s.op == "call" and s.args == (0,))
        other = self.do("call", 1, kind="maps", layer=first.settings["layer"])
        mine = self.net.inputs + self.net.program.index(first)
        return self.do(self.some("sum", "product", "minus"), mine, other)

    def inputs(self, seed: int, samples: int) -> Any:
        generator = torch.Generator().manual_seed(7919 * self.seed + seed)
        given = []
        for shape in self.shapes:
            if shape == ():
                given.append(torch.randint(TOKENS, (samples, 5), generator=generator))
            else:
                drawn = torch.randn(samples, *shape, generator=generator, dtype=torch.float64)
                given.append(drawn)
        if self.mapped:
            return {f"input{i}": x for i, x in enumerate(given)}
        return tuple(given) if len(given) > 1 or self.seed % 2 else (given[0],)

    def drawn(self) -> Drawn:
        r = self.start()
        blocks: dict[Callable[[int], int], float] = {
            self.block: 5, self.residual: 3, self.parallel: 1.5, self.halves: 4, self.gated: 1.5,
            self.grouped: 2, self.transposed: 0.7, self.normalised: 1.5, self.active: 1.5,
            self.bare: 1, self.odd: 0.7, self.reshaped: 2, self.resized: 0.7, self.back: 1.5,
        }  # fmt: skip
        if self.plain:
            for rare in (self.odd, self.reshaped, self.normalised, self.halves, self.transposed):
                blocks[rare] /= 4
        for _ in range(self.choose.randint(2, 6)):
            if self.chance(0.5):
                self.kept.append(r)
            [block] = self.choose.choices(list(blocks), list(blocks.values()))
            after = block(r)
            if self.values[after].numel() > 4000 or self.width(after) > 64:
                break
            r = after
        outputs = []
        if not self.plain and self.chance(0.15):
            outputs.append(r)  # a feature, returned and used further
        flat = self._flat(r)
        while self.chance(0.4):
            flat = self.some(self.block, self.residual, self.halves, self.bare, self.gated)(flat)
        outputs.insert(0, self._scores(flat))
        if not self.plain and self.chance(0.15):
            outputs.append(self._scores(flat))
        if not self.plain and self.chance(0.08):
            outputs.append(self.do("detach", r))
        if not self.plain and self.chance(0.08) and self.kept:
            outputs.append(self._scores(self._flat(self.kept[0])))
        forms = ("tuple", "with None", "list in tuple", "dict", "scores and numbers")
        form = "tensor" if len(outputs) == 1 else self.some(*forms)
        if form == "tensor" and not self.plain and self.chance(0.15):
            form = self.some(*forms)
        self.net.result = (form, tuple(outputs))
        for parameter in self.net.parameters():
            if not self.plain and self.chance(0.02):
                parameter.requires_grad_(False)
        self.net.train(self.chance(0.5))
        return Drawn(self.seed, self.net, self.inputs)

    def _flat(self, r: int) -> int:
        kind = self.kind(r)
        if kind == "flat":
            return r
        if kind == "tokens" and self.chance(0.3):
            r = self.recurrent(r)
            if self.kind(r) == "flat":
                return r
        if kind == "tokens":
            return self.do(self.some("mean over tokens", "last", "flatten"), r, kind="flat")
        form = self.choose.random()
        if form < 0.4:
            return self.do("mean over places", r, kind="flat")
        if form < 0.6:
            return self.do("flatten", r, kind="flat")
        if form < 0.7:
            sizes = self.choose.choices((1, 2, 3), k=self.some(1, 2, 3))
            return self.do("pyramid", r, kind="flat", sizes=sizes)
        if form < 0.75:
            return self.do("view", r, kind="flat", size=-1)
        if form < 0.8:
            if self.chance(0.3):
                return self.do("view", r, kind="flat", size=self.values[r][0].numel())
            return self.do("flatten permuted", r, kind="flat")
        if form < 0.85 and kind == "maps":
            return self.do("flatten", self.do("gram", r), kind="flat")
        if form < 0.95:
            tokens = self.tokened(r) if kind == "maps" else self.do("swap", r, kind="tokens")
            if self.chance(0.5):
                tokens = self.attention(tokens)
            return self._flat(tokens)
        pooled = self.do("kept mean", r)
        return self.do("flatten", pooled, kind="flat")

    def _scores(self, flat: int) -> int:
        if self.chance(0.1):
            return flat
        if self.width(flat) == 4 and self.chance(0.1):
            return self.do("softmax", flat, dim=1)
        return self.layer("head", nn.Linear(self.width(flat), 3), flat)


@torch.no_grad()
def _wake(layer: nn.Module) -> None:
    """Weights by He's rule; vectors and statistics away from 0 and 1."""
    for name, parameter in layer.named_parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=(2 / max(1, parameter[0].numel())) ** 0.5)
        elif "weight" in name and not isinstance(layer, nn.RNNBase):
            parameter.uniform_(0.5, 1.5)
        else:
            parameter.normal_(std=0.4)
    for name, buffer in layer.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(std=0.5)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 2)
