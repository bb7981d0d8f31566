"""Whether one network can be pruned: taken from dense to small, as sp and as sr, and compared."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import update_bn

from dpm_core import DecayPruningError, SelfRectifying, SmoothPruning, Trajectory
from dpm_core.adapters.base import count_macs, count_parameters
from dpm_core.adapters.depgraph import DepGraph, DepGraphOptions
from dpm_core.third_party.attention import split_attention

from ..errors import RunError
from ..running import training
from .networks import Candidate
from .traits import traits

Row = dict[str, Any]
"""The figures of one network."""
BATCH, PROBES = 2, 4
RATIO = 0.3
"""Share of every group's structures that goes."""
SMOOTH = {"sp": SmoothPruning(2), "sr": SmoothPruning(4)}
# Releases as many as it may: replacements are to be tried out, not a criterion.
RECTIFY = SelfRectifying(Trajectory(rate=-1.0, length=-1e9), max_share=0.3)
RATE = 1e-3
TOLERANCE = 1e-8
"""Largest difference of outputs, as a share of :func:`spread`, unless rounding alone does more.
They are compared in double precision, where a slice that is not zero makes a far larger one; in
single precision the two could look alike."""
NOISE = 1e-14
"""Noise on every pixel, as a share of its size: some fifty roundings. What it does to the outputs
stands for what rounding in all layers does, which can be a lot in a random network of a hundred."""
MOVED = 1e-3
"""The small model's outputs have to differ from the dense one's by this share at least."""
UNLIKE = "sp and sr removed unlike amounts"


def measure(asked: Candidate) -> Row:
    """Prune a network as sp and as sr, and compare what was zeroed with what is small.

    Returns:
        The row. ``outcome`` is ``works`` or ``fails``, with a ``message`` that names the cause.
    """
    started = time.process_time()
    row: Row = {"network": asked.name, "size": asked.size, "outcome": "works", "message": ""}
    try:
        torch.manual_seed(0)
        dense = awake(asked.build())
        example = torch.randn(BATCH, 3, asked.size, asked.size)
        row["parameters"] = count_parameters(dense)
        row["traits"] = traits(dense, example)
        split_attention(dense)
        row["macs"] = count_macs(dense, example)
        row["variants"] = {}
        for variant in SMOOTH:
            row["variants"][variant], row["skipped"] = prune(dense, example, variant)
        row["message"] = failure(row["variants"])
    except DecayPruningError as cause:
        row["message"] = str(cause)
    except Exception as cause:  # whatever upstream fails on: the table goes on
        row["message"] = f"{type(cause).__name__}: {cause}"
    if row["message"]:
        row["outcome"] = "fails"
    return row | {"seconds": time.process_time() - started}


@torch.no_grad()
def awake(model: nn.Module) -> nn.Module:
    """Give a network weights, in place, by which every parameter has an effect on its outputs.

    Fresh networks hide mistakes: a head or a residual branch that starts at zero makes whatever is
    before it invisible, norms that are all one and zero let channels of zeros pass unchanged, and
    without norms signals fade from layer to layer. So weights are drawn by He's rule, and vectors
    that are constant get values of their own.
    """
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            constant = bool((parameter == parameter.flatten()[0]).all())
            if isinstance(module, (nn.Conv2d, nn.Linear)) and name == "weight":
                nn.init.kaiming_normal_(parameter, nonlinearity="relu")
            elif constant and parameter.flatten()[0] == 0:
                nn.init.normal_(parameter, std=0.1)
            elif constant:
                nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def prune(dense: nn.Module, example: Tensor, variant: str) -> tuple[Row, dict[str, str]]:
    """Take a copy of a network from dense to small.

    Returns:
        The figures, and the groups that were left as they are, with the reason.
    """
    model, before = copy.deepcopy(dense), copy.deepcopy(dense)
    torch.manual_seed(1)
    options = DepGraphOptions(ratio=RATIO, global_pruning=False, skip_unsupported=True)
    rectify = RECTIFY if variant == "sr" else None
    run = DepGraph(model, example, options, SMOOTH[variant], rectify)
    run.check()

    def loss() -> Tensor:
        logits = model(torch.randn_like(example))
        return functional.cross_entropy(logits, torch.randint(logits.shape[1], (len(example),)))

    optimizer = torch.optim.SGD(model.parameters(), RATE, momentum=0.9)
    run.attach(optimizer)
    assert run.dpm is not None
    while not run.due:
        model.train()
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    # Running statistics of so few steps would let evaluation drown in, or lose, the signal.
    batches = [torch.randn_like(example) for _ in range(2)]
    update_bn(batches, model)
    update_bn(batches, before)
    images = torch.randn(PROBES, *example.shape[1:])
    zeroed = outputs(model, images)
    noise = NOISE * torch.randn(images.shape, dtype=torch.float64)
    shaken = outputs(model, images * (1 + noise))
    run.remove()
    small = outputs(model, images)
    if not small.isfinite().all() or not spread(zeroed) > 1e-9 * zeroed.abs().max():
        raise RunError(f"{variant}: the outputs are not finite, or the same for all images")
    events = run.dpm.events
    return {
        "decayed": sum(len(e.structures) for e in events if e.kind == "decay" and e.wave == 0),
        "released": sum(len(e.structures) for e in events if e.kind == "release"),
        "pruned": run.pruned,
        "macs": count_macs(model, example),
        "difference": float((small - zeroed).abs().max() / spread(zeroed)),
        "rounding": float((shaken - zeroed).abs().max() / spread(zeroed)),
        "moved": float((small - outputs(before, images)).abs().max() / spread(zeroed)),
    }, run.skipped


def outputs(model: nn.Module, images: Tensor) -> Tensor:
    """The model's outputs in evaluation, in double precision; it stays as it is."""
    return training.outputs(copy.deepcopy(model).double(), images.double())


def spread(out: Tensor) -> Tensor:
    """The largest distance of outputs, (B, classes), from their mean over the images."""
    return (out - out.mean(0)).abs().max()


def failure(variants: Mapping[str, Row]) -> str:
    """What is wrong with the figures of sp and sr; empty if nothing is."""
    for name, row in variants.items():
        if row["pruned"] != row["decayed"] or row["pruned"] == 0:
            return f"{name}: {row['pruned']} of {row['decayed']} structures were removed"
        if not row["rounding"] <= MOVED:
            return f"{name}: rounding moves the outputs by {row['rounding']:.1e} of their spread"
        if not row["difference"] <= max(TOLERANCE, row["rounding"]):
            return f"{name}: outputs differ by {row['difference']:.1e} of their spread"
        if not row["moved"] > MOVED:
            return f"{name}: the outputs are those of the dense network, which shows nothing"
    if len({(row["pruned"], row["macs"]) for row in variants.values()}) > 1:
        return UNLIKE
    return ""
