# %% [markdown]
# # DepGraph: from a trained network to a smaller one
#
# DepGraph (torch-pruning) decides once, before fine-tuning: it ranks the channels of a trained
# network and removes the least important ones in one step. The adapter lets them decay instead,
# while fine-tuning goes on, and takes back what the gradients resist.
#
# This tutorial trains a small VGG on handwritten digits and prunes it to a third of its
# computation, without and with decay. It stops a run and goes on, and saves, reloads and exports
# the result. Every number is printed by the code.
#
# Run it as a script from the repository, `python tutorials/depgraph.py`, or open the notebook of
# the same name.

# %%
import copy
import sys
from pathlib import Path

sys.path.insert(0, "..")  # the repository, whether this runs in its folder tutorials
sys.path.insert(0, ".")  # or at its top

import matplotlib.pyplot as plt
import torch
from torch.nn import functional

from dpm_core import SelfRectifying, SmoothPruning
from dpm_core.adapters.base import Training, count_macs, count_parameters
from dpm_core.adapters.depgraph import DepGraph, DepGraphOptions
from dpm_core.adapters.removal import Removal
from dpm_core.adapters.saved import load_pruned
from experiments.inputs import data, models
from experiments.running.export import onnx, program
from experiments.running.training import accuracy, norms_now, outputs, reestimated
from tutorials.shared import draw_channels, draw_norms

torch.set_num_threads(1)  # the tensors are small: threads would wait for one another
OUT = Path("runs/tutorials")
OUT.mkdir(parents=True, exist_ok=True)

# %% [markdown]
# ## A trained network
#
# This is yours to replace: any network that torch-pruning can trace, trained in any way. A batch
# depends on its position and a seed alone, so all runs see the same data.

# %%
BATCH = 64
images = data.load("digits", Path("data"))
example = images.normalize(images.test[:64])
per_epoch = images.steps_per_epoch(BATCH)

dense = models.build("vgg-digits", in_channels=1, classes=10, seed=0)
steps = 3 * per_epoch
optimizer = torch.optim.SGD(dense.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=steps)
for step in range(steps):
    inputs, labels = images.batch(BATCH, step, seed=0)
    optimizer.zero_grad()
    functional.cross_entropy(dense(inputs), labels).backward()
    optimizer.step()
    schedule.step()

print(f"dense: {accuracy(dense, images):.1f}%, {count_macs(dense, example) / 1e6:.2f} M MACs")

# %% [markdown]
# ## One run of the framework
#
# The **options** are the framework's own: a third of the MACs, each layer ranked by itself. What
# you give besides says what happens to the chosen channels:
#
# - nothing: the framework alone, which removes them at once (we call this *base*);
# - `SmoothPruning(steps)`: they decay over so many steps, and are removed then (*+SP*);
# - and `SelfRectifying()`: those that resist are released, and others decay in their place (*+SR*).
#
# The length of the training is told so that a decay that does not fit into it is refused at once.

# %%
options = DepGraphOptions(speed_up=3.0, global_pruning=False, steps=50)
length = Training(steps=3 * per_epoch, steps_per_epoch=per_epoch)


def start(smooth=None, rectify=None):
    """A copy of the dense network, and the framework at work on it."""
    model = copy.deepcopy(dense)
    return model, DepGraph(model, example, options, smooth, rectify, training=length)


def new_optimizer(model):
    """Full learning rate for two thirds of the training: a decay belongs where it is high."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2 * length.steps // 3], gamma=0.1)
    return optimizer, schedule


# %% [markdown]
# ## The training loop
#
# It is a plain PyTorch loop with two lines more. `run.attach(optimizer)` comes before it: DepGraph
# decides there, and from then on works in the hooks of `optimizer.step()`. After a step `run.due`
# says whether the removal is to follow: at once in base, else when all that goes is zero.
# `run.remove()` makes the model smaller, in place. Optimizer and schedule go on, and the momentum
# of what stays is kept.


# %%
def train(model, run, optimizer, schedule, first=0, last=length.steps):
    """Train from one step to another; gives the accuracies and the norms on the way."""
    curve, trace = [], []
    for step in range(first, last):
        model.train()
        inputs, labels = images.batch(BATCH, step, seed=1)
        optimizer.zero_grad()
        functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
        schedule.step()
        if run.dpm and not run.complete:
            trace.append(norms_now(run.dpm))  # for the plots
        if run.due:
            run.remove()
            fresh = accuracy(reestimated(model, images), images)
            print(f"removed after step {step + 1}: {accuracy(model, images):.1f}%, ", end="")
            print(f"{fresh:.1f}% with BatchNorm re-estimated")
        if step % 4 == 0:
            curve.append((step + 1, accuracy(model, images)))
    return curve, trace


# %%
base_model, base = start()
optimizer, schedule = new_optimizer(base_model)
base.attach(optimizer)
base_curve, _ = train(base_model, base, optimizer, schedule)
print(f"base: {accuracy(base_model, images):.1f}% in the end")

# %% [markdown]
# Now with decay. This run stops in the middle of the decay, and saves a checkpoint: what
# `state_dict()` gives of the model, of the optimizer and schedule, and of the run.

# %%
STOP = 10
model, run = start(SmoothPruning(steps=20), SelfRectifying())
optimizer, schedule = new_optimizer(model)
run.attach(optimizer)
curve, trace = train(model, run, optimizer, schedule, last=STOP)

parts = {"run": run, "model": model, "optimizer": optimizer, "schedule": schedule}
torch.save({name: part.state_dict() for name, part in parts.items()}, OUT / "depgraph.pt")

more_curve, more_trace = train(model, run, optimizer, schedule, first=STOP)
curve, trace = curve + more_curve, trace + more_trace
print(f"+SR: {accuracy(model, images):.1f}% in the end")

# %% [markdown]
# To go on from the checkpoint, begin with the dense network, as at the start. The run comes first:
# it gives the model the layers that it had. Then load the model's values, make the optimizer, and
# attach. The run ends in the same bits as the one that was not interrupted.

# %%
saved = torch.load(OUT / "depgraph.pt", weights_only=True)
resumed, second = start(SmoothPruning(steps=20), SelfRectifying())
second.load_state_dict(saved["run"])
resumed.load_state_dict(saved["model"])
optimizer, schedule = new_optimizer(resumed)
optimizer.load_state_dict(saved["optimizer"])
schedule.load_state_dict(saved["schedule"])
second.attach(optimizer)
train(resumed, second, optimizer, schedule, first=STOP)

same = all(map(torch.equal, resumed.state_dict().values(), model.state_dict().values()))
print(f"resumed, with the same weights in the end: {same}")
assert same

# %% [markdown]
# ## What happened
#
# The accuracy on the test images. With base all is removed at the start, and the network recovers
# from there. With +SR structures go little by little, and at the removal, the dotted line, nothing
# is lost any more: what goes is zero already. Note that base has had as many steps by then, and has
# recovered, too. What the method is worth is no matter of a single run.
#
# Look at the accuracies with BatchNorm re-estimated, too, that the loop printed. BatchNorm's
# running statistics are means over many past steps. They lag behind a network that changes as fast
# as during a decay. Part of each dip is this lag, and not knowledge that was lost.

# %%
figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
axis.plot(*zip(*base_curve, strict=True), color="#6b6b6b", label="base")
axis.plot(*zip(*curve, strict=True), color="#d55e00", label="+SR")
axis.axvline(trace[-1][0], color="#d55e00", linestyle=":")
axis.set(xlabel="fine-tuning steps", ylabel="test accuracy, %")
axis.legend(frameon=False)
figure.savefig(OUT / "depgraph-accuracy.png")

# %% [markdown]
# One line for the norm of each structure. All decay on a straight line to zero. Some are
# **released** at the triangles, train on, and others decay in their place, so that the target is
# still met.

# %%
for kind in ("decay", "release", "prune"):
    structures = sum(len(e.structures) for e in run.events() if e.kind == kind)
    print(f"{kind}: {structures} structures")
figure = draw_norms(trace, run.events())
figure.savefig(OUT / "depgraph-norms.png")

# %% [markdown]
# ## The smaller network
#
# It is an ordinary `nn.Module` with narrower layers.

# %%
small = model.eval()
print(f"MACs: {count_macs(dense, example):,} dense, {count_macs(small, example):,} pruned")
print(f"parameters: {count_parameters(dense):,} dense, {count_parameters(small):,} pruned")
for name, other in {"base": base, "+SR": run}.items():
    speed_up = count_macs(dense, example) / count_macs(other.model, example)
    print(f"{name}: {speed_up:.2f} times fewer MACs, {other.pruned} structures removed")
    assert speed_up >= options.speed_up
assert accuracy(small, images) > 90

figure = draw_channels(dense, small)
figure.savefig(OUT / "depgraph-channels.png")

# %% [markdown]
# ## Save and reload
#
# `run.removed` is the removal: which channels of which layer went. It saves itself with the small
# network; the file has tensors and no code. To reload, build the dense network and give it the
# file. The outputs are the same, bit for bit.

# %%
path = OUT / "depgraph.safetensors"
run.removed.save(path, small, facts={"network": "vgg-digits", "framework": "depgraph"})
print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")

again = load_pruned(path, models.build("vgg-digits", in_channels=1, classes=10), example).eval()
same = torch.equal(outputs(again, example), outputs(small, example))
print(f"reloaded, with the same outputs: {same}")
assert same
assert Removal.load(path) == run.removed

# %% [markdown]
# ## Export
#
# As ONNX for other runtimes, and as a program of `torch.export`, which PyTorch loads without the
# network's source. Both files are run, and kept only if the outputs agree.

# %%
print(f"ONNX: outputs differ by {onnx(small, example, OUT / 'depgraph.onnx'):.1e} at most")
difference = program(small, example, OUT / "depgraph.pt2")
print(f"torch.export: outputs differ by {difference:.1e} at most")

# %% [markdown]
# ## Where to go from here
#
# - `make bench-depgraph VARIANT=sr` does all this from a configuration file, with a record,
#   checkpoints and resuming.
# - One run of one seed says little about which variant is better: `make compare` runs several seeds
#   and the controls.
# - `otov2.py` and `gate_decorator.py`, beside this file, are about the other frameworks.
