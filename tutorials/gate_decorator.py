# %% [markdown]
# # Gate-Decorator: a trained network, made smaller bit by bit
#
# Gate-Decorator puts a gate behind every BatchNorm: one factor for each channel. It then takes
# turns. In a **tick** the convolutions are frozen, each gate collects a score, and at the end the
# lowest scores of the whole network are selected. In a **tock** everything trains, and gates are
# kept small. Some channels go in every tick, until the computation is down to the target. The
# original masks them at once; the adapter lets their gates decay, on through the ticks and tocks
# that follow.
#
# This tutorial trains a small VGG on handwritten digits, prunes it to less than a third of its
# computation, and saves, reloads and exports the result. Every number is printed by the code.
#
# Run it as a script from the repository, `python tutorials/gate_decorator.py`, or open the notebook
# of the same name.

# %%
import copy
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, "..")  # the repository, whether this runs in its folder tutorials
sys.path.insert(0, ".")  # or at its top

import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.nn import functional

from dpm_core import SelfRectifying, SmoothPruning
from dpm_core.adapters.base import Training, count_macs, count_parameters
from dpm_core.adapters.gate_decorator import GateDecorator, GateDecoratorOptions
from dpm_core.adapters.saved import load_pruned
from experiments.inputs import data, models
from experiments.running.export import onnx
from experiments.running.training import accuracy, norms_now, outputs
from tutorials.shared import draw_channels, draw_norms

torch.set_num_threads(1)  # the tensors are small: threads would wait for one another
OUT = Path("runs/tutorials")
OUT.mkdir(parents=True, exist_ok=True)

# %% [markdown]
# ## A trained network

# %%
BATCH = 64
images = data.load("digits", Path("data"))
example = images.normalize(images.test[:64])
per_epoch = images.steps_per_epoch(BATCH)


def update(model, optimizer, step, seed):
    """One training step."""
    model.train()
    inputs, labels = images.batch(BATCH, step, seed)
    optimizer.zero_grad()
    functional.cross_entropy(model(inputs), labels).backward()
    optimizer.step()


dense = models.build("vgg-digits", in_channels=1, classes=10, seed=0)
steps = 4 * per_epoch
optimizer = torch.optim.SGD(dense.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=steps)
for step in range(steps):
    update(dense, optimizer, step, seed=0)
    schedule.step()
print(f"dense: {accuracy(dense, images):.1f}%, {count_macs(dense, example) / 1e6:.2f} M MACs")

# %% [markdown]
# ## The options
#
# `macs` is the target: the share of the computation that may be left. `fraction` is how many of the
# remaining gates a tick selects. Upstream's recipes take a tiny share in very many ticks; this run
# is short, so each tick takes more. Three ticks of one epoch follow one tock. What is left of the
# training when the target is met is fine-tuning, at least `finetune_epochs`.
#
# What is selected decays over 20 steps, and what resists is released. Without `SmoothPruning` and
# `SelfRectifying` it would be masked at once, as in the original.

# %%
model = copy.deepcopy(dense)
options = GateDecoratorOptions(
    macs=0.3, fraction=0.15, low_rate=0.005, tock_epochs=1, ticks=3, finetune_epochs=4
)
length = Training(steps=16 * per_epoch, steps_per_epoch=per_epoch)
run = GateDecorator(model, example, options, SmoothPruning(20), SelfRectifying(), training=length)

# %% [markdown]
# ## Train
#
# The loop is yours, and so is the optimizer. `attach` puts the gates into the network and into the
# optimizer. The learning rate is the method's own: it starts at `low_rate`, and rises to the
# optimizer's and falls again in every tock and in the fine-tuning. A schedule of yours would have
# no effect.
#
# As soon as the target is met and nothing decays any more, `run.due` says so. `run.remove()` melts
# the gates into plain BatchNorms and removes what is zero. Fine-tuning goes on with the same
# optimizer, started afresh.

# %%
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
run.attach(optimizer)

curve, trace = [], []
for step in range(length.steps):
    update(model, optimizer, step, seed=1)
    if step % 10 == 0:
        curve.append((step, accuracy(model, images)))
    if not run.complete:
        trace.append(norms_now(run.dpm))  # for the plots
    if run.due:
        zeroed = outputs(model, example)
        run.remove()
        difference = (outputs(model, example) - zeroed).abs().max().item()
        removed_after = step + 1

print(f"removed after {removed_after} steps; outputs changed by {difference:.1e} at most")
assert difference < 1e-3

# %% [markdown]
# ## What happened
#
# Selections follow one another at the ticks. A structure here is a gate with its shift, so the
# norms are those of BatchNorm's scale and shift. What was released is ACTIVE again, and the next
# selection takes as many more in its place, wherever in the network their scores are lowest.

# %%
selections = Counter()
for event in run.events():
    if event.kind == "decay":
        selections[event.step] += len(event.structures)
print(f"{len(selections)} selections: " + ", ".join(f"{n} at {t}" for t, n in selections.items()))
for kind in ("decay", "release", "prune"):
    structures = sum(len(e.structures) for e in run.events() if e.kind == kind)
    print(f"{kind}: {structures} structures")
assert len(selections) > 1

figure = draw_norms(trace, run.events())
figure.savefig(OUT / "gate-decorator-norms.png")

# %% [markdown]
# The accuracy on the test images. The dotted lines are the first selection, and the removal, where
# fine-tuning begins.

# %%
figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
axis.plot(*zip(*curve, strict=True), color="#d55e00")
for step in (min(selections), removed_after):
    axis.axvline(step, color="#6b6b6b", linestyle=":")
axis.set(xlabel="training steps", ylabel="test accuracy, %")
figure.savefig(OUT / "gate-decorator-accuracy.png")

# %% [markdown]
# ## The smaller network
#
# No gate is left.

# %%
small = model.eval()
share = count_macs(small, example) / count_macs(dense, example)
print(f"removed {run.pruned} structures")
print(f"{share:.1%} of the MACs are left, {options.macs:.1%} was asked for")
print(f"parameters: {count_parameters(dense):,} dense, {count_parameters(small):,} pruned")
print(f"accuracy: {accuracy(dense, images):.1f}% dense, {accuracy(small, images):.1f}% pruned")
assert {type(m) for m in small.modules()} == {type(m) for m in dense.modules()}
assert sum(isinstance(m, nn.BatchNorm2d) for m in small.modules()) == 6
assert share <= options.macs
assert accuracy(small, images) > 90

figure = draw_channels(dense, small)
figure.savefig(OUT / "gate-decorator-channels.png")

# %% [markdown]
# ## Save, reload, export
#
# `run.removed` is the removal: which channels of which layer went. It saves itself with the small
# network; the file has tensors and no code. To reload, build the dense network and give it the
# file. `onnx` runs what it has written in onnxruntime, and keeps it only if the outputs agree.

# %%
path = OUT / "gate-decorator.safetensors"
run.removed.save(path, small, facts={"network": "vgg-digits", "framework": "gate-decorator"})
again = load_pruned(path, models.build("vgg-digits", in_channels=1, classes=10), example).eval()
same = torch.equal(outputs(again, example), outputs(small, example))
print(f"{path}: {path.stat().st_size / 1e6:.2f} MB; reloaded, with the same outputs: {same}")
assert same

difference = onnx(small, example, OUT / "gate-decorator.onnx")
print(f"ONNX: outputs differ by {difference:.1e} at most")

# %% [markdown]
# ## Where to go from here
#
# - `depgraph.py`, beside this file, stops a run and goes on from a checkpoint.
# - Run it without `SelfRectifying`, and without `SmoothPruning`, with several seeds, before you say
#   which is better: `make compare FRAMEWORK=gate-decorator`.
# - `make bench-gate-decorator VARIANT=sr` does all this from a configuration file, with a record,
#   checkpoints and resuming.
