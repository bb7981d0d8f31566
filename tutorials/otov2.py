# %% [markdown]
# # OTOv2: train once, and get a smaller network
#
# OTOv2 (only_train_once) needs no trained network. It is an optimizer, DHSPG: it trains from
# scratch, and on the way pushes redundant structures towards zero. Where a norm gets small, its
# half-space projection sets the structure to zero in one step. The adapter starts a decay there
# instead.
#
# This tutorial trains a small VGG on handwritten digits in one go, removes most of its structures,
# and saves, reloads and exports the result. It uses the project's own training loop; `depgraph.py`,
# beside this file, writes one out. Every number is printed by the code.
#
# Run it as a script from the repository, `python tutorials/otov2.py`, or open the notebook of the
# same name.

# %%
import sys
from pathlib import Path

sys.path.insert(0, "..")  # the repository, whether this runs in its folder tutorials
sys.path.insert(0, ".")  # or at its top

import matplotlib.pyplot as plt
import torch

from dpm_core import SelfRectifying, SmoothPruning
from dpm_core.adapters.base import AdapterError, Context, count_macs, count_parameters
from dpm_core.adapters.otov2 import OTOv2, OTOv2Options
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
# ## The network and its training
#
# One stage holds all of it. The learning rate falls at the milestones, and mixup, which upstream's
# recipe has, blends images.

# %%
images = data.load("digits", Path("data"))
example = images.normalize(images.test[:64])
dense = models.build("vgg-digits", in_channels=1, classes=10, seed=0)  # only to compare with
model = models.build("vgg-digits", in_channels=1, classes=10, seed=0)

stage = Stage(epochs=20, batch=64, learning_rate=0.1, milestones=(13, 17), momentum=0.0, mixup=0.2)
plan = stage.plan(images.steps_per_epoch(stage.batch))
print(f"{plan.steps} training steps, untrained network: {accuracy(model, images):.1f}%")

# %% [markdown]
# ## The options
#
# They have upstream's names. `target_group_sparsity` is the share of structures to remove.
# `start_epoch` is when upstream chooses what it penalises; until then it trains plainly. `lmbda`,
# the penalty's strength, and `epsilon`, how early the half-space takes hold, have to fit the length
# of the training. This one is short, so both are large.
#
# The variant is `sr`: structures decay over 20 steps, and those that resist are released.
# Upstream's next-ranked structures of the same group then go in their place.

# %%
options = OTOv2Options(
    target_group_sparsity=0.625,
    tolerance_group_sparsity=0.0,
    start_epoch=4,
    epsilon=0.95,
    lmbda=0.2,
)
context = Context(
    model=model,
    example=example,
    variant="sr",
    smooth=SmoothPruning(steps=20),
    rectify=SelfRectifying(),
    stages={"prune": plan},
)
adapter = OTOv2(context, options)
adapter.check()  # refuses what cannot work, before any training

# %% [markdown]
# `check` says what is impossible, and why, before anything is trained:

# %%
try:
    OTOv2(context, OTOv2Options(target_group_sparsity=0.999)).check()
except AdapterError as refusal:
    print(f"refused: {refusal}")
else:
    raise AssertionError("this target should have been refused")

# %% [markdown]
# ## Train
#
# The loop asks the adapter for its optimizer, and calls it around each step. It follows the norms
# of what decays, and takes the accuracy every ten steps once the framework has begun.

# %%
loop = Loop(
    model=model,
    images=images,
    seed=0,
    stages=[("prune", stage)],
    adapter=adapter,
    curve=Curve(every=10, until=plan.steps),
)
loop.run()

progress = loop.progress
print(f"upstream chose after {progress.decided_at} steps; all was zero after {progress.zero_at}")
for kind in ("decay", "release", "prune"):
    structures = sum(len(e.structures) for e in adapter.dpm.events if e.kind == kind)
    print(f"{kind}: {structures} structures")
assert adapter.pruned == sum(len(e.structures) for e in adapter.dpm.events if e.kind == "prune")

# %% [markdown]
# Decays start in rounds, wherever upstream would have set structures to zero. The norms, from the
# first step on:

# %%
figure = draw_norms(progress.trace, adapter.dpm.events)
figure.savefig(OUT / "otov2-norms.png")

# %% [markdown]
# And the accuracy on the test images. Zero is the step at which upstream has chosen; the dotted
# line is where the last structure that goes became zero.

# %%
figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
axis.plot(*zip(*progress.curve, strict=True), color="#d55e00")
axis.axvline(progress.zero_at - progress.decided_at, color="#6b6b6b", linestyle=":")
axis.set(xlabel="training steps since the decision", ylabel="test accuracy, %")
figure.savefig(OUT / "otov2-accuracy.png")

# %% [markdown]
# ## The smaller network
#
# As upstream has it, the network keeps its size until the end of the training. Then whatever is
# zero is removed, and the outputs stay what they were.

# %%
small = model.eval()
difference = progress.found["output_difference"]
total = sum(group.size for group in adapter.dpm.groups.values())
print(
    f"removed {adapter.pruned} of {total} structures; outputs changed by {difference:.1e} at most"
)
print(f"MACs: {count_macs(dense, example):,} dense, {count_macs(small, example):,} pruned")
print(f"parameters: {count_parameters(dense):,} dense, {count_parameters(small):,} pruned")
print(f"accuracy: {accuracy(small, images):.1f}%")
assert adapter.pruned == options.target_group_sparsity * total
assert difference < 1e-3
assert count_macs(small, example) < count_macs(dense, example) / 2
assert accuracy(small, images) > 90

figure = draw_channels(dense, small)
figure.savefig(OUT / "otov2-channels.png")

# %% [markdown]
# ## Save, reload, export
#
# The file holds the tensors and what was removed, and no code. To reload, build the dense network
# and give it the file. `onnx` runs what it has written in onnxruntime, and keeps it only if the
# outputs agree.

# %%
path = OUT / "otov2.safetensors"
save_pruned(path, small, adapter.removed, facts={"network": "vgg-digits", "framework": "otov2"})
again = load_pruned(path, models.build("vgg-digits", in_channels=1, classes=10), example).eval()
same = torch.equal(outputs(again, example), outputs(small, example))
print(f"{path}: {path.stat().st_size / 1e6:.2f} MB; reloaded, with the same outputs: {same}")
assert same

difference = onnx(small, example, OUT / "otov2.onnx")
print(f"ONNX: outputs differ by {difference:.1e} at most")

# %% [markdown]
# ## Where to go from here
#
# - `variant="base"` is upstream's optimizer untouched, and `"sp"` decays without releases. Run all
#   three, with several seeds, before you say which is better: `make compare FRAMEWORK=otov2`.
# - `make bench-otov2 VARIANT=sr` does all this from a configuration file, with a record,
#   checkpoints and resuming.
