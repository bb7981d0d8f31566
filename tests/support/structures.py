"""Networks of which a test gives the layers and the forward pass, and what they lose."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from dpm_core.adapters.depgraph import structure_groups
from dpm_core.third_party import dependency, running

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(2))


class Net(nn.Module):
    """Layers by name, and a forward pass that is given."""

    def __init__(self, run: Any, **layers: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(self, *args, **kwargs)


def conv(*sizes: int, **settings: Any) -> nn.Conv2d:
    return nn.Conv2d(*sizes, 3, padding=1, **settings)


def sizes(model: nn.Module, example: Any, **settings: Any) -> dict[str, int]:
    return {g.name: g.size for g in structure_groups(model, example, **settings)}


def assert_exact(model: nn.Module, example: Any, seed: int = 0) -> int:
    """Drawn structures are the same at zero and removed. Returns how many channels were removed."""
    draw, model = torch.Generator().manual_seed(seed), model.double().eval()
    example = running.map_tensors(example, lambda t: t.double() if t.is_floating_point() else t)
    plan = []
    with torch.no_grad():
        for group in structure_groups(model, example):
            keep = int(torch.randint(1, group.size, (), generator=draw))
            chosen = torch.randperm(group.size, generator=draw)[keep:]
            for s in group.slices:
                s.parameter.index_fill_(s.dim, s.index[chosen].flatten(), 0)
            root = next(s for s in group.slices if s.name == f"{group.name}.weight")
            plan.append((group.name, sorted(root.index[chosen].flatten().tolist())))
        before = running.tensors(running.call(model, example))
        dependency.remove(model, example, plan)
        after = running.tensors(running.call(model, example))
    assert before
    for one, other in zip(before, after, strict=True):
        one, other = one.double(), other.double()  # masks, too
        assert (one - other).abs().max() <= 1e-10 * one.abs().max()
    return sum(len(channels) for _, channels in plan)


def norm_between(norm: nn.Module) -> nn.Module:
    return Net(lambda m, x: m.o(F.relu(m.n(m.a(x)))), a=conv(3, 8), n=norm, o=nn.Conv2d(8, 3, 1))
