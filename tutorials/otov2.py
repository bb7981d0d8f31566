# %% [markdown]
# # OTOv2: train once, and get a smaller network
#
# OTOv2 (only_train_once) needs no trained network. It is an optimizer, DHSPG: it trains from
# scratch, and on the way pushes redundant structures towards zero. Where a norm gets small, its
# half-space projection sets the structure to zero in one step. The adapter starts a decay there
# instead.
#
# This tutorial trains a small VGG on handwritten digits in one go, removes most of its structures,
# and saves, reloads and exports the result. Every number is printed by the code.
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
from torch.nn import functional

from dpm_core import SelfRectifying, SmoothPruning
from dpm_core.adapters.base import AdapterError, Training, count_macs, count_parameters
from dpm_core.adapters.otov2 import OTOv2, OTOv2Options
from dpm_core.adapters.saved import load_pruned
from experiments.inputs import data, models
from experiments.running.export import onnx
from experiments.running.training import accuracy, norms_now, outputs
from tutorials.shared import draw_channels, draw_norms

torch.set_num_threads(1)  # the tensors are small: threads would wait for one another
OUT = Path("runs/tutorials")
OUT.mkdir(parents=True, exist_ok=True)

# %% [markdown]
# ## The network and its training

# %%
BATCH = 64
images = data.load("digits", Path("data"))
example = images.normalize(images.test[:64])
per_epoch = images.steps_per_epoch(BATCH)
length = Training(steps=8 * per_epoch, steps_per_epoch=per_epoch)

model = models.build("vgg-digits", in_channels=1, classes=10, seed=0)
dense = models.build("vgg-digits", in_channels=1, classes=10)  # only to compare with
print(f"{length.steps} training steps, untrained network: {accuracy(model, images):.1f}%")

# %% [markdown]
# ## The options
#
# They have upstream's names. `target_group_sparsity` is the share of structures to remove.
# `start_epoch` is when upstream chooses what it penalises; until then it trains plainly. `lmbda`,
# the penalty's strength, and `epsilon`, how early the half-space takes hold, have to fit the length
# of the training. This one is short, so both are large.
#
# `SmoothPruning` lets structures decay over 20 steps, and `SelfRectifying` releases those that
# resist. Upstream's next-ranked structures of the same group then go in their place. Without the
# two you have upstream's optimizer untouched.

# %%
options = OTOv2Options(
    target_group_sparsity=0.625,
    tolerance_group_sparsity=0.0,
    start_epoch=2,
    epsilon=0.95,
    lmbda=0.5,
)
run = OTOv2(model, example, options, SmoothPruning(20), SelfRectifying(), training=length)

# %% [markdown]
# `check` says what is impossible, and why, before anything is trained. `attach` calls it where you
# have not.

# %%
run.check()
try:
    OTOv2(model, example, OTOv2Options(target_group_sparsity=0.999), training=length).check()
except AdapterError as refusal:
    print(f"refused: {refusal}")
else:
    raise AssertionError("this target should have been refused")

# %% [markdown]
# ## Train
#
# `run.dhspg` makes upstream's optimizer for this network; its settings are upstream's, too. All
# else is your own loop. As upstream has it, the network keeps its size until the end: `run.due`
# becomes true after the last step. Then whatever is zero is removed, and the outputs stay what
# they were.

# %%
optimizer = run.dhspg(variant="sgd", lr=0.1, weight_decay=1e-4)
milestones = [5 * per_epoch, 7 * per_epoch]
schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=0.1)
run.attach(optimizer)

curve, trace = [], []
for step in range(length.steps):
    model.train()
    inputs, labels = images.batch(BATCH, step, seed=0)
    optimizer.zero_grad()
    functional.cross_entropy(model(inputs), labels).backward()
    optimizer.step()
    schedule.step()
    if step % 8 == 0:
        curve.append((step, accuracy(model, images)))
    trace.append(norms_now(run.dpm))  # for the plots
    if run.due:
        zeroed = outputs(model, example)
        run.remove()
        difference = (outputs(model, example) - zeroed).abs().max().item()

print(f"removed {run.pruned} structures; outputs changed by {difference:.1e} at most")
assert difference < 1e-3

# %% [markdown]
# Decays start in rounds, wherever upstream would have set structures to zero. One line for the
# norm of each structure; a triangle is a release:

# %%
for kind in ("decay", "release", "prune"):
    structures = sum(len(e.structures) for e in run.events() if e.kind == kind)
    print(f"{kind}: {structures} structures")
figure = draw_norms(trace, run.events())
figure.savefig(OUT / "otov2-norms.png")

# %% [markdown]
# And the accuracy on the test images. The dotted lines are where the first decay began, and where
# the last structure that goes became zero.

# %%
figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
axis.plot(*zip(*curve, strict=True), color="#d55e00")
for event in (run.events()[0], run.events()[-1]):
    axis.axvline(event.step, color="#6b6b6b", linestyle=":")
axis.set(xlabel="training steps", ylabel="test accuracy, %")
figure.savefig(OUT / "otov2-accuracy.png")

# %% [markdown]
# ## The smaller network

# %%
small = model.eval()
total = sum(group.size for group in run.dpm.groups.values())
print(f"structures: {run.pruned} of {total} removed")
print(f"MACs: {count_macs(dense, example):,} dense, {count_macs(small, example):,} pruned")
print(f"parameters: {count_parameters(dense):,} dense, {count_parameters(small):,} pruned")
print(f"accuracy: {accuracy(small, images):.1f}%")
assert run.pruned == options.target_group_sparsity * total
assert count_macs(small, example) < count_macs(dense, example) / 2
assert accuracy(small, images) > 90

figure = draw_channels(dense, small)
figure.savefig(OUT / "otov2-channels.png")

# %% [markdown]
# ## Save, reload, export
#
# `run.removed` is the removal: which channels of which layer went. It saves itself with the small
# network; the file has tensors and no code. To reload, build the dense network and give it the
# file. `onnx` runs what it has written in onnxruntime, and keeps it only if the outputs agree.
#
# To train on, make a new optimizer: DHSPG is of the full size.

# %%
path = OUT / "otov2.safetensors"
run.removed.save(path, small, facts={"network": "vgg-digits", "framework": "otov2"})
again = load_pruned(path, models.build("vgg-digits", in_channels=1, classes=10), example).eval()
same = torch.equal(outputs(again, example), outputs(small, example))
print(f"{path}: {path.stat().st_size / 1e6:.2f} MB; reloaded, with the same outputs: {same}")
assert same

difference = onnx(small, example, OUT / "otov2.onnx")
print(f"ONNX: outputs differ by {difference:.1e} at most")

# %% [markdown]
# ## Where to go from here
#
# - `depgraph.py`, beside this file, stops a run and goes on from a checkpoint.
# - Run it without `SelfRectifying`, and without `SmoothPruning`, with several seeds, before you say
#   which is better: `make compare FRAMEWORK=otov2`.
# - `make bench-otov2 VARIANT=sr` does all this from a configuration file, with a record,
#   checkpoints and resuming.
