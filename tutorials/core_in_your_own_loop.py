# %% [markdown]
# # The core in your own training loop
#
# You have a network, an optimizer and a training loop, and you want no framework. The core,
# `dpm_core`, needs three things from you: **structure groups** that say what belongs together, your
# **optimizer**, and your **decision** about what goes. It then works around every
# `optimizer.step()`; nothing else in the loop changes.
#
# The loop here has what real loops have: gradient accumulation, mixed precision, clipping and a
# learning-rate schedule. Every number is printed by the code.
#
# Run it as a script from the repository, `python tutorials/core_in_your_own_loop.py`, or open the
# notebook of the same name.

# %%
import itertools
import sys
from pathlib import Path

sys.path.insert(0, "..")  # the repository, whether this runs in its folder tutorials
sys.path.insert(0, ".")  # or at its top

import torch
from torch import nn
from torch.nn import functional

from dpm_core import (
    DecayPruning,
    GradientError,
    Phase,
    SelfRectifying,
    Slice,
    SmoothPruning,
    StructureGroup,
)
from dpm_core.adapters.base import count_macs
from dpm_core.adapters.removal import Removal
from dpm_core.adapters.saved import load_pruned
from experiments.inputs import data, models
from experiments.running.training import accuracy, norms_now, outputs
from tutorials.shared import draw_channels, draw_norms

torch.set_num_threads(1)  # the tensors are small: threads would wait for one another
torch.manual_seed(0)
OUT = Path("runs/tutorials")
OUT.mkdir(parents=True, exist_ok=True)

# %% [markdown]
# ## Your loop, before any pruning
#
# The data is scikit-learn's handwritten digits, the network a small VGG: convolution, BatchNorm and
# ReLU, six times.

# %%
images = data.load("digits", Path("data"))
model = models.build("vgg-digits", in_channels=1, classes=10, seed=0)

BATCH, ACCUMULATE = 32, 2
batches = (images.batch(BATCH, position, seed=0) for position in itertools.count())

# %% [markdown]
# One update is one optimizer step. Two batches of 32 are accumulated into it. The forward pass runs
# in half precision under `torch.autocast`; the parameters stay float32. On a CPU that is bfloat16.
# On a GPU, move `model` and `images` there with `.to("cuda")` before the groups are made, and write
# `"cuda"` and `torch.float16` for `"cpu"` and `torch.bfloat16`.
#
# float16 has a small range and needs the gradient scaler: the loss is scaled up before `backward`,
# and the gradients down before they are clipped. Where they overflow, the scaler leaves the step
# out and lowers its scale.


# %%
scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)


def accumulate_gradients(factor=1.0):
    """Gradients of the mean loss over ``ACCUMULATE`` batches, scaled."""
    for _ in range(ACCUMULATE):
        inputs, labels = next(batches)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(inputs)
        loss = factor * functional.cross_entropy(logits.float(), labels) / ACCUMULATE
        scaler.scale(loss).backward()


def update(factor=1.0):
    """One optimizer step; says whether the scaler let it happen."""
    model.train()
    optimizer.zero_grad()
    accumulate_gradients(factor)
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
    scaler.step(optimizer)
    scale = scaler.get_scale()
    scaler.update()
    if scaler.get_scale() < scale:
        return False
    schedule.step()  # only after a real step
    return True


# %%
UPDATES = 80
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=UPDATES)
for _ in range(UPDATES):
    update()

dense = accuracy(model, images)
print(f"dense: {dense:.1f}% of the test images are classified right")

# %% [markdown]
# ## What belongs together
#
# A **structure** is the smallest thing that is removed whole. Here it is an output channel of a
# convolution *with all that produces it*: a row of the kernel, its bias, and the weight and bias of
# the BatchNorm behind it. Do not leave BatchNorm out. It undoes any scaling of the row before it,
# so rows alone would decay without any effect on training.
#
# A **slice** is the share of one parameter. A **structure group** is all structures that share the
# same parameters. In this network every convolution has a group of its own. Where channels are
# tied, as by a residual connection, several convolutions belong to one group; then let
# `dpm_core.adapters.depgraph.structure_groups` find the groups.

# %%
convolutions = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
batch_norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]

groups = [
    StructureGroup(
        name,
        [
            Slice.whole(conv.weight, name=f"{name}.weight"),  # which channel each structure is
            Slice.whole(conv.bias),
            Slice.whole(norm.weight, batch_norm=True),
            Slice.whole(norm.bias, batch_norm=True),
        ],
    )
    for (name, conv), norm in zip(convolutions.items(), batch_norms, strict=True)
]
print({group.name: f"{group.size} structures" for group in groups})

# %% [markdown]
# ## Attach, and decide
#
# A new optimizer and schedule for the pruning: the decay comes first, where the learning rate is
# high, and what is left of the training repairs. A decay of 5 to 15% of the updates is a good
# length; these few updates allow 20%.
#
# `attach` uses PyTorch's own step hooks. `decay` is your decision: here the half of every group
# that has the smallest norms.
#
# Three quarters into the decay, Self-Rectifying **releases** structures whose gradients resist:
# they are ACTIVE again, and safe from then on. What goes in their place is your decision, too.
# `refill` asks for it: how many, in which group, and which of its structures are free to go.

# %%
UPDATES = 100
optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=5e-4)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=UPDATES)
dpm = DecayPruning(groups, SmoothPruning(steps=20), SelfRectifying())


def smallest(group, count, free):
    """The numbers of the structures with the smallest norms, of those that are free."""
    norms = dpm.groups[group].norms()
    norms[~free] = torch.inf
    return norms.argsort()[:count]


dpm.attach(optimizer, refill=smallest)

goal = sum(group.size // 2 for group in groups)
dpm.decay({group.name: group.norms().argsort()[: group.size // 2] for group in groups})
print(f"{dpm.count(Phase.DECAYING)} structures decay, {dpm.count(Phase.ACTIVE)} do not")

# %% [markdown]
# From now on the same loop prunes. The core counts *optimizer steps*, not batches: with
# accumulation, a decay of 20 steps takes 40 batches here. Clipping comes before the step and needs
# no change. After the step, each decaying structure's norm is exactly on its schedule, whatever the
# optimizer made of it.

# %%
trace = [norms_now(dpm)]
for _ in range(5):
    update()
    trace.append(norms_now(dpm))

first = dpm.events[0]
was, now = first.norms[0], dpm.groups[first.group].norms()[first.structures[0]].item()
print(f"after {dpm.clock} of {dpm.smooth.steps} steps {now / was:.4f} of the first norm is left")
assert dpm.clock == 5
assert abs(now / was - (1 - 5 / 20)) < 1e-4

# %% [markdown]
# ## A step that is skipped
#
# Loops skip steps. Here a factor of infinity makes the gradients overflow, so the scaler leaves the
# step out. A skipped step decays nothing: the clock stands still, and so do the norms. An optimizer
# with `fused=True` is called all the same, and leaves the step out inside; the core notices that.

# %%
before = norms_now(dpm)
stepped = update(factor=float("inf"))
print(f"overflow: stepped {stepped}, clock {dpm.clock}, the scale is now {scaler.get_scale():.0f}")
assert not stepped
assert norms_now(dpm) == before

# %% [markdown]
# If you step on gradients that are not finite, the core refuses before anything has changed,
# parameters and optimizer included. You can skip the step and go on.

# %%
optimizer.zero_grad()
accumulate_gradients()
convolutions[first.group].weight.grad[first.structures[0]] = torch.nan
try:
    optimizer.step()
except GradientError as refusal:
    print(f"refused: {refusal}")
else:
    raise AssertionError("the step should have been refused")
assert norms_now(dpm) == before

# %% [markdown]
# ## To the end

# %%
while dpm.clock < UPDATES:
    update()
    if dpm.clock <= 40:
        trace.append(norms_now(dpm))

print(f"pruned {dpm.count(Phase.PRUNED)} of {goal}, decaying {dpm.count(Phase.DECAYING)}")
assert dpm.count(Phase.PRUNED) == goal
assert dpm.count(Phase.DECAYING) == 0

# %% [markdown]
# `dpm.events` says what happened, and when.

# %%
for kind in ("decay", "release", "prune"):
    events = [event for event in dpm.events if event.kind == kind]
    structures = sum(len(event.structures) for event in events)
    print(f"{kind}: {structures} structures, in steps {sorted({e.step for e in events})}")

# %%
figure = draw_norms(trace, dpm.events)
figure.savefig(OUT / "core-norms.png")

# %% [markdown]
# Pruned structures are exactly zero, and held there while training goes on. Released ones train
# like all others: their lines leave the schedule at the triangles.
#
# ## Make the network smaller
#
# A zero structure does nothing, so it can be removed: the outputs stay what they are. A `Removal`
# says which channels go: here those that are PRUNED. `apply` takes them out by torch-pruning's
# dependency graph, together with the inputs that the next layers no longer need. In the middle of a
# training write `removal.apply(model, example, optimizer)`, and the optimizer goes on with what is
# left of its state.

# %%
dpm.detach()
example = images.normalize(images.test[:64])
zeroed, macs = outputs(model, example), count_macs(model, example)

removal = Removal.of(dpm)
removal.apply(model, example)

difference = (outputs(model, example) - zeroed).abs().max().item()
share = count_macs(model, example) / macs
print(f"{share:.1%} of the computation is left; outputs differ by {difference:.1e} at most")
print(f"accuracy: {dense:.1f}% dense, {accuracy(model, images):.1f}% pruned")
assert difference < 1e-3
assert share < 0.5
assert accuracy(model, images) > 90

# %% [markdown]
# The file holds the tensors and the removal, and no code. To reload, build the dense network and
# give it the file.

# %%
removal.save(OUT / "core.safetensors", model)

again = models.build("vgg-digits", in_channels=1, classes=10)
figure = draw_channels(again, model)
figure.savefig(OUT / "core-channels.png")

load_pruned(OUT / "core.safetensors", again, example)
same = torch.equal(outputs(again, example), outputs(model, example))
print(f"reloaded, with the same outputs: {same}")
assert same

# %% [markdown]
# ## Where to go from here
#
# - A checkpoint needs `dpm.state_dict()` besides the model's and the optimizer's.
# - `SelfRectifying(Hearing())` looks at what each structure would do if it came back. It needs
#   owners in the groups, and `attach(optimizer, model=model, loss=closure)`.
# - `depgraph.py`, beside this file, lets a framework choose, and exports the small network.
