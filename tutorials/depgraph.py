# %% [markdown]
# # DepGraph: from a trained network to a smaller one
#
# DepGraph (torch-pruning) decides once, before fine-tuning: it ranks the channels of a trained
# network and removes the least important ones in one step. The adapter lets them decay instead,
# while fine-tuning goes on, and takes back what the gradients resist.
#
# This tutorial trains a small VGG on handwritten digits, prunes it to a third of its computation,
# without and with decay, and saves, reloads and exports the result. The training loop is written
# out, so that you see every call an adapter gets. Every number is printed by the code.
#
# Run it as a script from the repository, `python tutorials/depgraph.py`, or open the notebook of
# the same name.

# %%
import copy
import sys
import warnings
from pathlib import Path

sys.path.insert(0, "..")  # the repository, whether this runs in its folder tutorials
sys.path.insert(0, ".")  # or at its top

import matplotlib.pyplot as plt
import torch
from torch.nn import functional

from dpm_core import SelfRectifying, SmoothPruning
from dpm_core.adapters.base import Context, Stage, count_macs, count_parameters
from dpm_core.adapters.depgraph import DepGraph, DepGraphOptions
from dpm_core.adapters.saved import load_pruned, read, save_pruned
from experiments import data, models
from experiments.export import onnx
from experiments.training import accuracy, norms_now, outputs, reestimated
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
per_epoch = images.steps_per_epoch(BATCH)
example = images.normalize(images.test[:64])

dense = models.build("vgg-digits", in_channels=1, classes=10, seed=0)
steps = 12 * per_epoch
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
# ## What an adapter is told
#
# A **stage** is one stretch of training; DepGraph needs `prune`, and can have `sparse` before it.
# The **options** are the framework's own: a third of the MACs, each layer ranked by itself. The
# **variant** says what happens to the chosen channels:
#
# - `base`: the framework alone, which removes them at once;
# - `sp`: they decay over 20 steps, and are removed then;
# - `sr`: they decay, and those that resist are released.

# %%
stage = Stage(
    steps=12 * per_epoch,
    steps_per_epoch=per_epoch,
    kind="sgd",
    learning_rate=0.02,
    momentum=0.9,
    weight_decay=5e-4,
)
options = DepGraphOptions(speed_up=3.0, global_pruning=False)


def make_adapter(model, variant):
    """An adapter for one run of one variant; it works on the model in place."""
    context = Context(
        model=model,
        example=example,
        variant=variant,
        smooth=SmoothPruning(steps=20),
        rectify=SelfRectifying(),
        stages={"prune": stage},
    )
    adapter = DepGraph(context, options)
    adapter.check()  # refuses what cannot work, before any training
    return adapter


# %% [markdown]
# ## The training loop
#
# This is the whole protocol. Read it once, and you can put any adapter into a loop of your own:
#
# 1. `adapter.optimizer(stage)` makes the optimizer, `adapter.begin(...)` starts the stage. DepGraph
#    decides here.
# 2. In each step, `before_step`, `after_backward` and `after_step` stand where their names say.
#    Afterwards, released structures have been replaced.
# 3. `due()` says when the removal is to follow: at once in `base`, when all is zero in `sp` and
#    `sr`. `remove()` makes the model smaller, in place. Its parameters are new objects then, so it
#    needs a new optimizer, and the stage goes on. (`dpm_core.adapters.optimizer_state` lets the old one go
#    on, momentum and all.)
#
# `next_loss` is also handed to `begin`, for criteria that look at some batches more. Such a batch
# counts as a training step, which is why the function counts.


# %%
def learning_rate(step):
    """Full for two thirds of the stage, then a tenth. Decays belong where it is high."""
    return stage.learning_rate * (1.0 if step < 2 * stage.steps / 3 else 0.1)


def prune(variant):
    """Prune a copy of the dense network; gives the adapter, the accuracies and the norms."""
    model = copy.deepcopy(dense)
    adapter = make_adapter(model, variant)
    curve, trace = [], []
    step = 0

    def look():
        """Accuracy as the network is, and with BatchNorm's running statistics re-estimated."""
        fresh = reestimated(model, images)
        curve.append((step, accuracy(model, images), accuracy(fresh, images)))

    def next_loss():
        nonlocal step
        inputs, labels = images.batch(BATCH, step, seed=1)
        step += 1
        return functional.cross_entropy(model(inputs), labels)

    optimizer = adapter.optimizer("prune")
    adapter.begin("prune", optimizer, next_loss)
    while True:
        if adapter.due():
            adapter.remove()
            optimizer = adapter.optimizer("prune")
            adapter.begin("prune", optimizer, next_loss)
            look()
            _, raw, fresh = curve[-1]
            print(f"{variant}: {raw:.1f}% at the removal, step {step}; re-estimated {fresh:.1f}%")
        if step >= stage.steps:
            break

        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        model.train()
        adapter.before_step(step)
        optimizer.zero_grad()
        next_loss().backward()
        adapter.after_backward()
        optimizer.step()
        adapter.after_step()

        if step <= 60 and step % 3 == 0:  # for the plots
            look()
        if adapter.dpm is not None and adapter.removed is None:
            trace.append(norms_now(adapter.dpm))
    print(f"{variant}: {accuracy(model, images):.1f}% in the end")
    return adapter, curve, trace


# %%
runs = {variant: prune(variant) for variant in ("base", "sr")}

# %% [markdown]
# ## What happened
#
# The accuracy on the test images. With `base` all is removed at the start, and the network recovers
# from there. With `sr` structures go little by little, and at the removal, the dotted line, nothing
# is lost any more: what goes is zero already.
#
# Look at the dashed lines, too. For them BatchNorm's running statistics are re-estimated on
# training images. They are means over many past steps, and lag behind a network that changes as
# fast as during a decay. Most of both dips is this lag, and not knowledge that was lost.

# %%
figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
for (variant, (_, curve, _)), colour in zip(runs.items(), ("#6b6b6b", "#d55e00"), strict=True):
    steps, raw, fresh = zip(*curve, strict=True)
    assert min(fresh) > min(raw)
    axis.plot(steps, raw, color=colour, label=variant)
    axis.plot(steps, fresh, "--", color=colour, label=f"{variant}, re-estimated")
axis.axvline(runs["sr"][2][-1][0], color="#d55e00", linestyle=":")
axis.set(xlabel="fine-tuning steps", ylabel="test accuracy, %")
axis.legend(frameon=False)
figure.savefig(OUT / "depgraph-accuracy.png")

# %% [markdown]
# One line for the norm of each structure. All decay on a straight line to zero. Some are
# **released** at the triangles, train on, and others decay in their place, so that the target is
# still met.

# %%
adapter, _, trace = runs["sr"]
for kind in ("decay", "release", "prune"):
    structures = sum(len(e.structures) for e in adapter.dpm.events if e.kind == kind)
    print(f"{kind}: {structures} structures")
figure = draw_norms(trace, adapter.dpm.events)
figure.savefig(OUT / "depgraph-norms.png")

# %% [markdown]
# ## The smaller network
#
# It is an ordinary `nn.Module` with narrower layers, in the adapter's context.

# %%
small = adapter.context.model.eval()
print(f"MACs: {count_macs(dense, example):,} dense, {count_macs(small, example):,} pruned")
print(f"parameters: {count_parameters(dense):,} dense, {count_parameters(small):,} pruned")
for variant, (other, _, _) in runs.items():
    speed_up = count_macs(dense, example) / count_macs(other.context.model, example)
    print(f"{variant}: {speed_up:.2f} times fewer MACs, {other.pruned} structures removed")
    assert speed_up >= options.speed_up
assert accuracy(small, images) > 90

figure = draw_channels(dense, small)
figure.savefig(OUT / "depgraph-channels.png")

# %% [markdown]
# ## Save and reload
#
# The file holds the tensors and what was removed, and no code. To reload, build the dense network
# and give it the file. The outputs are the same, bit for bit.

# %%
path = OUT / "depgraph.safetensors"
save_pruned(path, small, adapter.removed, facts={"network": "vgg-digits", "framework": "depgraph"})
print(f"{path}: {path.stat().st_size / 1e6:.2f} MB, facts {read(path).facts}")

again = load_pruned(path, models.build("vgg-digits", in_channels=1, classes=10), example).eval()
same = torch.equal(outputs(again, example), outputs(small, example))
print(f"reloaded, with the same outputs: {same}")
assert same

# %% [markdown]
# ## Export
#
# As ONNX for other runtimes: `onnx` runs the file in onnxruntime and keeps it only if the outputs
# agree. And as a program of `torch.export`, which PyTorch loads without the network's source.

# %%
difference = onnx(small, example, OUT / "depgraph.onnx")
print(f"ONNX: outputs differ by {difference:.1e} at most")

batch = torch.export.Dim("batch")
program = torch.export.export(small, (example,), dynamic_shapes=({0: batch},))
torch.export.save(program, OUT / "depgraph.pt2")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # PyTorch warns of a buffer that it only reads
    loaded = torch.export.load(OUT / "depgraph.pt2").module()
few = example[:5]
with torch.no_grad():
    difference = (loaded(few) - small(few)).abs().max().item()
print(f"torch.export: outputs differ by {difference:.1e} at most, on {len(few)} images")
assert difference < 1e-4

# %% [markdown]
# ## Where to go from here
#
# - `make bench-depgraph VARIANT=sr` does all this from a configuration file, with a record,
#   checkpoints and resuming.
# - One run of one seed says little about which variant is better: `make compare` runs several seeds
#   and the controls.
# - `otov2.py` and `gate_decorator.py`, beside this file, are about the other frameworks.
