"""One case per adapter for the contract suite, and the smallest loop that can drive any of them."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dpm_core import Event, SelfRectifying, SmoothPruning, Trajectory
from dpm_core.adapters import registry
from dpm_core.adapters.base import Adapter, Training
from dpm_core.adapters.removal import Removal
from tests.support.rounding import exact_outputs, in_double

CLASSES = 5


class SmallResNet(nn.Module):
    """A tied residual group, a free one, and a layer behind a flatten."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(12)
        self.inner = nn.Conv2d(12, 16, 3, padding=1)
        self.inner_norm = nn.BatchNorm2d(16)
        self.outer = nn.Conv2d(16, 12, 3, padding=1)
        self.outer_norm = nn.BatchNorm2d(12)
        self.last = nn.Conv2d(12, 10, 3)
        self.hidden = nn.Linear(10 * 36, 14)
        self.head = nn.Linear(14, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.norm(self.stem(x)))
        inner = functional.relu(self.inner_norm(self.inner(x)))
        x = functional.relu(x + self.outer_norm(self.outer(inner)))
        x = functional.relu(self.last(x)).flatten(1)
        return self.head(functional.relu(self.hidden(x)))


def small_resnet(seed: int = 0) -> nn.Module:
    return _awake(SmallResNet, seed)


def group_normed(seed: int = 0) -> nn.Module:
    """With GroupNorms of two channels to a group in the place of BatchNorms."""
    model = small_resnet(seed)
    for name, norm in list(model.named_children()):
        if isinstance(norm, nn.BatchNorm2d):
            grouped = nn.GroupNorm(norm.num_features // 2, norm.num_features)
            grouped.load_state_dict({"weight": norm.weight, "bias": norm.bias})
            setattr(model, name, grouped)
    return model


def bias_less(seed: int = 0) -> nn.Module:
    """With BatchNorms that scale and do not shift."""
    model = small_resnet(seed)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.register_parameter("bias", None)
    return model


def _awake(kind: type[nn.Module], seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = kind()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
    return model


class Mixed(nn.Module):
    """A depthwise and a grouped convolution, a concatenation, a shared module, and a flatten."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.grouped = nn.Conv2d(12, 16, 3, 2, padding=1, groups=4, bias=False)
        self.grouped_norm = nn.BatchNorm2d(16)
        self.aside, self.aside_norm = nn.Conv2d(12, 10, 1, 2), nn.BatchNorm2d(10)
        self.both_norm = nn.BatchNorm2d(26)  # of both
        self.narrow = nn.Conv2d(26, 10, 1)
        self.shared = nn.Conv2d(10, 10, 3, padding=1)  # runs twice
        self.norms = nn.ModuleList([nn.BatchNorm2d(10), nn.BatchNorm2d(10)])
        self.hidden = nn.Linear(10 * 16, 14)
        self.head = nn.Linear(14, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.depthwise(functional.relu(self.norm(self.stem(x)))))
        parts = [self.grouped_norm(self.grouped(x)), self.aside_norm(self.aside(x))]
        x = functional.relu(self.narrow(functional.relu(self.both_norm(torch.cat(parts, 1)))))
        for norm in self.norms:
            x = functional.relu(norm(self.shared(x)))
        return self.head(functional.relu(self.hidden(x.flatten(1))))


class Shuffled(nn.Module):
    """Channels are split, joined and shuffled by a reshape, which torch-pruning cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.aside = nn.ModuleList([nn.Conv2d(4, 4, 3, padding=1) for _ in range(2)])
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.stem(x))
        for conv in self.aside:
            left, right = x.chunk(2, 1)
            x = torch.cat([left, functional.relu(conv(right))], 1)
            x = x.unflatten(1, (2, -1)).transpose(1, 2).reshape(x.shape)
        return self.head(x.mean((2, 3)))


class Grouped(nn.Module):
    """Structures of several positions, a weight whose output is dimension 1, a shared BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.grouped = nn.Conv2d(16, 24, 3, padding=1, groups=4)
        self.up = nn.ConvTranspose2d(24, 10, 2)
        self.up_norm = nn.BatchNorm2d(10)
        self.wide = nn.BatchNorm2d(26)  # of two groups
        self.head = nn.Linear(26, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.norm(self.first(x)))
        x = functional.relu(self.depthwise(x))
        y = functional.relu(self.up_norm(self.up(functional.relu(self.grouped(x)))))
        both = torch.cat([x, y[..., :-1, :-1]], 1)
        return self.head(functional.relu(self.wide(both)).mean((2, 3)))


def mixed(seed: int = 0) -> nn.Module:
    return _awake(Mixed, seed)


EXAMPLE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
EAGER = SelfRectifying(Trajectory(rate=-1.0, length=-1e9), max_share=0.4)
"""Releases as many as it may."""


@dataclass
class Case:
    """What the contract suite needs to know of a framework."""

    name: str
    framework: str
    options: dict[str, Any]
    stages: dict[str, int]
    """Steps of each stage."""
    most_macs: float
    """Share of the dense model's MACs that the target leaves at most."""
    impossible: dict[str, Any]
    """Changed options that ask for too much."""
    short: int = 5
    """Steps of the stage ``prune`` that are enough for ``base``, and too few for a decay."""
    learning_rate: float = 0.05
    momentum: float = 0.9
    refills_in_group: bool = True
    """Whether a released structure is replaced in its own group, so that all sizes are the same."""
    removals: int = 1
    build: Callable[[], nn.Module] = small_resnet
    computes: bool = False
    """Whether a removal computes parameters, and so rounds them, instead of only keeping them."""

    def exact(self) -> nn.Module:
        """The model, in double precision where else a removal would round its parameters."""
        return in_double(self.build()) if self.computes else self.build()

    def adapter(
        self,
        model: nn.Module,
        variant: str,
        *,
        smooth: SmoothPruning | None = None,
        rectify: SelfRectifying = EAGER,
        stages: dict[str, int] | None = None,
        options: dict[str, Any] | None = None,
    ) -> Adapter:
        """For ``base`` without smoothing, for ``sp`` without a rectifier, for ``sr`` with both."""
        kind, steps = registry.load(self.framework), stages or self.stages
        return kind(
            model,
            EXAMPLE.to(next(model.parameters())),  # its device and type
            kind.Options(**(self.options if options is None else options)),
            None if variant == "base" else smooth or SmoothPruning(6),
            rectify if variant == "sr" else None,
            training=Training(
                steps["prune"], 3, Training(steps["sparse"], 3) if "sparse" in steps else None
            ),
        )

    def new_optimizer(self, adapter: Adapter) -> torch.optim.Optimizer:
        """Of the model as it is, as the framework has it."""
        return adapter.new_optimizer("sgd", self.learning_rate, self.momentum, 5e-4)


_DEPGRAPH = {"speed_up": 2.0, "steps": 25}
CASES = [
    Case("depgraph", "depgraph", _DEPGRAPH, {"prune": 16}, 0.5, {"speed_up": 1e6}),
    Case(
        "depgraph-sparse",
        "depgraph",
        _DEPGRAPH,
        {"sparse": 7, "prune": 16},
        0.5,
        {"speed_up": 1e6},
    ),
    # Each layer by itself: with ranks of their own the variants' second rounds end in equal sizes.
    Case(
        "depgraph-rounds",
        "depgraph",
        {"speed_up": 3.0, "steps": 25, "global_pruning": False, "rounds": 2, "round_epochs": 4},
        {"prune": 26},
        1 / 3,
        {"speed_up": 1e6},
        short=14,
        removals=2,
    ),
    # Reads batches before each decision, and rounds what it leaves.
    Case(
        "depgraph-taylor",
        "depgraph",
        {**_DEPGRAPH, "importance": "taylor", "batches": 2, "round_to": 2},
        {"sparse": 7, "prune": 18},
        0.5,
        {"speed_up": 1e6},
        short=7,
    ),
    Case(
        "depgraph-mixed",
        "depgraph",
        _DEPGRAPH,
        {"prune": 16},
        0.5,
        {"speed_up": 1e6},
        build=mixed,
    ),
    Case(
        "otov2",
        "otov2",
        {
            "target_group_sparsity": 0.5,
            "tolerance_group_sparsity": 0.0,
            "start_epoch": 1,
            "epsilon": 0.95,
            "lmbda": 4.0,
        },
        {"prune": 34},
        0.6,
        {"target_group_sparsity": 0.99},
        momentum=0.0,
    ),
    Case(
        "gate-decorator",
        "gate-decorator",
        {
            "macs": 0.6,
            "fraction": 0.1,
            "tock_epochs": 1,
            "ticks": 2,
            "low_rate": 0.01,
            "finetune_epochs": 2,
        },
        {"prune": 60},
        0.6,
        {"macs": 0.01},
        short=14,
        refills_in_group=False,
        computes=True,
    ),
    Case("torch-prune", "torch-prune", {"amount": 0.4}, {"prune": 16}, 0.5, {"amount": 0.99}),
]
ROUNDED = [
    replace(case, name=f"{case.name}-rounded", options={**case.options, "round_to": 4})
    for case in CASES
    if case.name in ("otov2", "gate-decorator", "torch-prune")
]
"""Widths that are multiples; DepGraph's are in a case above."""
CASES += ROUNDED


def batch(number: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1000 + number)
    labels = torch.randint(0, CLASSES, (16,), generator=draw, device="cpu")
    images = torch.randn(16, 3, 8, 8, generator=draw, dtype=torch.float32, device="cpu")
    return images + labels.view(-1, 1, 1, 1).to(images) * 0.3, labels


_passed: set[bytes] = set()


class _Likeness(pickle.Pickler):
    """Writes down what things are; tensors by their values, not by where they lie in memory."""

    def reducer_override(self, part: Any) -> Any:
        if not isinstance(part, Tensor):
            return NotImplemented
        what = type(part), part.shape, part.dtype, str(part.device), part.requires_grad
        values = part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        return tuple, ([*what, values],)


def check_once(adapter: Adapter) -> None:
    """Check an adapter that is new, unless one that is its like in all respects has passed.

    Hundreds of tests train the same few networks, and a check takes about as long as a training.
    Whatever cannot be pickled, as a class or a hook within a test, is always checked.
    """
    if adapter.checked or adapter.removed or adapter.complete:
        return
    written = io.BytesIO()
    settings = adapter.options, adapter.smooth, adapter.rectify, adapter.training
    around = torch.get_default_dtype(), str(torch.get_default_device())
    try:
        _Likeness(written).dump((type(adapter), adapter.model, adapter.example, settings, around))
    except (pickle.PicklingError, AttributeError, TypeError):
        adapter.check()
        return
    if written.getvalue() not in _passed:
        adapter.check()
        _passed.add(written.getvalue())
    adapter.checked = True


@dataclass
class Drive:
    """A user's training loop; can be stopped after any step and taken up from its state."""

    case: Case
    adapter: Adapter
    step: int = 0
    """Batches drawn so far, hearings' among them."""
    optimizer: torch.optim.Optimizer | None = None
    before_removal: nn.Module | None = None
    removed_before: Removal | None = None
    """What earlier removals had taken from ``before_removal``."""
    events: list[list[Event]] = field(default_factory=list)
    """What the core reported before each removal, structures numbered as in the dense model."""

    @property
    def model(self) -> nn.Module:
        return self.adapter.model

    @property
    def steps(self) -> int:
        training = self.adapter.training
        assert training is not None
        return training.steps + (0 if training.sparse is None else training.sparse.steps)

    def loss(self) -> Tensor:
        like = next(self.model.parameters())
        images, labels = batch(self.step)
        self.step += 1
        return functional.cross_entropy(self.model(images.to(like)), labels.to(like.device))

    def run(self, stop_after: int | None = None) -> Drive:
        check_once(self.adapter)
        if self.optimizer is None:
            self.optimizer = self.case.new_optimizer(self.adapter)
        if not self.adapter.optimizers:
            self.adapter.attach(self.optimizer, self.loss)
        while True:
            if self.adapter.due:
                self.before_removal = copy.deepcopy(self.model)
                self.removed_before = self.adapter.removed
                self.events.append(self.adapter.events())
                self.adapter.remove()
            if self.step >= (self.steps if stop_after is None else min(self.steps, stop_after)):
                return self
            self.model.train()
            self.optimizer.zero_grad()
            self.loss().backward()
            self.optimizer.step()


def until_removed(
    adapter: Adapter, learning_rate: float = 0.02, steps: int = 20
) -> tuple[Tensor, Tensor]:
    """Train until the next removal; the model's exact outputs just before and just after it."""
    model, example = adapter.model, adapter.example
    draw = torch.Generator().manual_seed(0)

    def loss() -> Tensor:
        images = torch.randn(4, *example.shape[1:], generator=draw)
        labels = torch.randint(CLASSES, (4,), generator=draw)
        return functional.cross_entropy(model(images), labels)

    check_once(adapter)
    if not adapter.optimizers:
        optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate, momentum=0.9)
        adapter.attach(optimizer, loss)
    optimizer = adapter.optimizer
    model.train()
    while not adapter.due:
        assert adapter.clock < steps
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    images = torch.randn(2, *example.shape[1:], generator=draw)
    before = exact_outputs(model, images)
    adapter.remove()
    return before, exact_outputs(model, images)
