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
# This tutorial trains a small VGG on handwritten digits, prunes it to a small part of its
# computation, and saves, reloads and exports the result. It uses the project's own training loop;
# `depgraph.py`, beside this file, writes one out. Every number is printed by the code.
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

from dpm_core import SelfRectifying, SmoothPruning
from dpm_core.adapters.base import Context, count_macs, count_parameters
from dpm_core.adapters.gate_decorator import GateDecorator, GateDecoratorOptions
from dpm_core.adapters.saved import load_pruned, save_pruned
from experiments import data, models
from experiments.config import Curve, Stage
from experiments.export import onnx
from experiments.training import Loop, accuracy, outputs
from tutorials.shared import draw_channels, draw_norms

torch.set_num_threads(1)  # the tensors are small: threads would wait for one another
OUT = Path("runs/tutorials")
OUT.mkdir(parents=True, exist_ok=True)

# %% [markdown]
# ## A trained network
#
# The loop trains a network without any adapter, too.

# %%
images = data.load("digits", Path("data"))
example = images.normalize(images.test[:64])
dense = models.build("vgg-digits", in_channels=1, classes=10, seed=0)
stage = Stage(epochs=15, batch=64, learning_rate=0.1, milestones=(8, 12))
Loop(model=dense, images=images, seed=0, stages=[("dense", stage)]).run()
print(f"dense: {accuracy(dense, images):.1f}%, {count_macs(dense, example) / 1e6:.2f} M MACs")

# %% [markdown]
# ## The options
#
# `macs` is the target: the share of the computation that may be left. `fraction` is how many of the
# remaining gates a tick selects. Upstream's recipes take a tiny share in very many ticks; this run
# is short, so each tick takes more. Four ticks of one epoch follow one tock. What is left of the
# stage when the target is met is fine-tuning, at least `finetune_epochs`.
#
# The learning rate is the method's own: it starts at `low_rate`, and rises to the stage's and falls
# again in every tock and in the fine-tuning.
#
# The variant is `sr`: what is selected decays over 30 steps, and what resists is released.

# %%
model = copy.deepcopy(dense)
stage = Stage(epochs=36, batch=64, learning_rate=0.05)
options = GateDecoratorOptions(
    macs=0.15, fraction=0.08, low_rate=0.005, tock_epochs=1, ticks=4, finetune_epochs=8
)
context = Context(
    model=model,
    example=example,
    variant="sr",
    smooth=SmoothPruning(steps=30),
    rectify=SelfRectifying(),
    stages={"prune": stage.plan(images.steps_per_epoch(stage.batch))},
)
adapter = GateDecorator(context, options)
adapter.check()  # refuses what cannot work, before any training

# %%
loop = Loop(
    model=model,
    images=images,
    seed=0,
    stages=[("prune", stage)],
    adapter=adapter,
    curve=Curve(every=10, until=1000),
)
loop.run()

progress = loop.progress

selections = Counter()
for event in adapter.dpm.events:
    if event.kind == "decay":
        selections[event.step] += len(event.structures)
print(f"{len(selections)} selections: " + ", ".join(f"{n} at {t}" for t, n in selections.items()))
for kind in ("decay", "release", "prune"):
    structures = sum(len(e.structures) for e in adapter.dpm.events if e.kind == kind)
    print(f"{kind}: {structures} structures")
assert len(selections) > 1

# %% [markdown]
# ## What happened
#
# A structure here is a gate with its shift, so the norms are those of BatchNorm's scale and shift.
# Selections follow one another at the ticks. A structure that was released is ACTIVE again, and the
# next selection takes as many more in its place, wherever in the network their scores are lowest.

# %%
figure = draw_norms(progress.trace, adapter.dpm.events)
figure.savefig(OUT / "gate-decorator-norms.png")

# %% [markdown]
# The accuracy on the test images, from the first selection on. The dotted line is the removal,
# where fine-tuning begins.

# %%
figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
axis.plot(*zip(*progress.curve, strict=True), color="#d55e00")
axis.axvline(progress.removed_at - progress.decided_at, color="#6b6b6b", linestyle=":")
axis.set(xlabel="training steps since the first selection", ylabel="test accuracy, %")
figure.savefig(OUT / "gate-decorator-accuracy.png")

# %% [markdown]
# ## The smaller network
#
# As soon as the target is met and nothing decays any more, the gates are melted into plain
# BatchNorms and what is zero is removed. No gate is left.

# %%
small = model.eval()
difference = progress.found["output_difference"]
share = count_macs(small, example) / count_macs(dense, example)
print(f"removed {adapter.pruned} structures; outputs changed by {difference:.1e} at most")
print(f"{share:.1%} of the MACs are left, {options.macs:.1%} was asked for")
print(f"parameters: {count_parameters(dense):,} dense, {count_parameters(small):,} pruned")
print(f"accuracy: {accuracy(dense, images):.1f}% dense, {accuracy(small, images):.1f}% pruned")
assert {type(m) for m in small.modules()} == {type(m) for m in dense.modules()}
assert sum(isinstance(m, nn.BatchNorm2d) for m in small.modules()) == 6
assert difference < 1e-3
assert share <= options.macs
assert accuracy(small, images) > 90

figure = draw_channels(dense, small)
figure.savefig(OUT / "gate-decorator-channels.png")

# %% [markdown]
# ## Save, reload, export
#
# The file holds the tensors and what was removed, and no code. To reload, build the dense network
# and give it the file. `onnx` runs what it has written in onnxruntime, and keeps it only if the
# outputs agree.

# %%
path = OUT / "gate-decorator.safetensors"
facts = {"network": "vgg-digits", "framework": "gate-decorator"}
save_pruned(path, small, adapter.removed, facts=facts)
again = load_pruned(path, models.build("vgg-digits", in_channels=1, classes=10), example).eval()
same = torch.equal(outputs(again, example), outputs(small, example))
print(f"{path}: {path.stat().st_size / 1e6:.2f} MB; reloaded, with the same outputs: {same}")
assert same

difference = onnx(small, example, OUT / "gate-decorator.onnx")
print(f"ONNX: outputs differ by {difference:.1e} at most")

# %% [markdown]
# ## Where to go from here
#
# - `variant="base"` masks at once, as the original does, and `"sp"` decays without releases. Run
#   all three, with several seeds, before you say which is better: `make compare
#   FRAMEWORK=gate-decorator`.
# - `make bench-gate-decorator VARIANT=sr` does all this from a configuration file, with a record,
#   checkpoints and resuming.
