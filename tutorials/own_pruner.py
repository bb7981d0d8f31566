# %% [markdown]
# # Your own pruner: torch-pruning as you use it, with decay
#
# You have a pruner of torch-pruning, with an importance and settings of your choice. It stays as
# it is: `DepGraph(pruner, ...)` takes it in place of a model. What the pruner's next step would
# remove decays instead, what resists is replaced by the next in the pruner's own ranking, and the
# removal goes by the pruner's own graph. You no longer call `pruner.step()`.
#
# This tutorial trains a small VGG with a layer that torch-pruning does not know, and prunes it in
# two steps by a ranking that needs gradients. Every number is printed by the code.
#
# Run it as a script from the repository, `python tutorials/own_pruner.py`, or open the notebook of
# the same name.

# %%
import copy
import sys
from pathlib import Path

sys.path.insert(0, "..")  # the repository, whether this runs in its folder tutorials
sys.path.insert(0, ".")  # or at its top

import matplotlib.pyplot as plt
import torch
import torch_pruning as tp
from torch import nn
from torch.nn import functional

from dpm_core import SelfRectifying, SmoothPruning
from dpm_core.adapters.base import count_macs
from dpm_core.adapters.depgraph import DepGraph
from dpm_core.adapters.saved import read
from experiments.inputs import data, models
from experiments.running.training import accuracy, norms_now, outputs
from tutorials.shared import draw_channels, draw_norms

torch.set_num_threads(1)  # the tensors are small: threads would wait for one another
OUT = Path("runs/tutorials")
OUT.mkdir(parents=True, exist_ok=True)

# %% [markdown]
# ## A network with a layer of your own
#
# `Scale` multiplies each channel by a number. How channels are taken from it stands in a class that
# torch-pruning calls, one of its `customized_pruners`.


# %%
class Scale(nn.Module):
    """One factor for each channel."""

    def __init__(self, channels):
        super().__init__()
        self.factor = nn.Parameter(torch.ones(1, channels, 1, 1))

    def forward(self, x):
        return x * self.factor


class ScalePruner(tp.BasePruningFunc):
    """Takes channels from a `Scale`, for torch-pruning."""

    def prune_out_channels(self, layer, idxs):
        keep = [i for i in range(layer.factor.shape[1]) if i not in set(idxs)]
        layer.factor = self._prune_parameter_and_grad(layer.factor, keep, 1)
        return layer

    prune_in_channels = prune_out_channels

    def get_out_channels(self, layer):
        return layer.factor.shape[1]

    get_in_channels = get_out_channels


def build():
    """The dense network: a small VGG, with a `Scale` behind its first convolution."""
    model = models.build("vgg-digits", in_channels=1, classes=10, seed=0)
    name, first = next((n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d))
    model.set_submodule(name, nn.Sequential(first, Scale(first.out_channels)))
    return model


# %%
BATCH = 64
images = data.load("digits", Path("data"))
example = images.normalize(images.test[:64])
per_epoch = images.steps_per_epoch(BATCH)


def train_step(model, optimizer, step, seed):
    """One step of an ordinary training."""
    model.train()
    inputs, labels = images.batch(BATCH, step, seed=seed)
    optimizer.zero_grad()
    functional.cross_entropy(model(inputs), labels).backward()
    optimizer.step()


dense, steps = build(), 3 * per_epoch
optimizer = torch.optim.SGD(dense.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=steps)
for step in range(steps):
    train_step(dense, optimizer, step, seed=0)
    schedule.step()
print(f"dense: {accuracy(dense, images):.1f}%, {count_macs(dense, example) / 1e6:.2f} M MACs")

# %% [markdown]
# ## Your pruner
#
# Any of torch-pruning's, with any of its settings. This one ranks by a Taylor expansion of the
# loss, keeps widths that are multiples of 4, and takes two steps to half of the channels.


# %%
def make_pruner(model):
    """As you would construct it without this project."""
    last = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    return tp.pruner.BasePruner(
        model,
        example,
        importance=tp.importance.GroupTaylorImportance(),
        pruning_ratio=0.5,
        round_to=4,
        iterative_steps=2,
        ignored_layers=[last],
        customized_pruners={Scale: ScalePruner()},
    )


def widths(model):
    """Channels of every convolution."""
    return [len(m.weight) for m in model.modules() if isinstance(m, nn.Conv2d)]


by_itself = copy.deepcopy(dense)
functional.cross_entropy(by_itself(example), images.test_labels[:64]).backward()
alone = make_pruner(by_itself)
for _ in range(2):
    alone.step()
print(f"channels: {widths(dense)} dense, {widths(by_itself)} by the pruner alone")

# %% [markdown]
# ## The loop
#
# `first=1`: the pruner decides after the first step, when the gradients of a batch are there. With
# 0, which is the default, it decides when you attach. `every=5`: its second step comes five
# optimizer steps after the removal of the first.

# %%
model = copy.deepcopy(dense)
pruner = make_pruner(model)
run = DepGraph(pruner, SmoothPruning(12), SelfRectifying(), first=1, every=5)
optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=5e-4)
run.attach(optimizer)

curve, trace, events = [], [], []
for step in range(4 * per_epoch):
    train_step(model, optimizer, step, seed=1)
    if run.dpm and run.decided and not run.removed:
        trace.append(norms_now(run.dpm))  # of the first decay, for the plot
        events = run.events()
    if run.due:
        zeroed = outputs(model, example)
        removal = run.remove()
        difference = (outputs(model, example) - zeroed).abs().max().item()
        print(f"step {step + 1}: removed channels of {len(removal)} layers, now {widths(model)};")
        print(f"  outputs changed by {difference:.1e} at most")
        assert difference < 1e-3
    if step % 4 == 0:
        curve.append((step + 1, accuracy(model, images)))

released = sum(len(e.structures) for e in events if e.kind == "release")
print(f"release: {released} structures in the first decay")
print(f"{accuracy(model, images):.1f}% in the end")
assert run.complete
assert widths(model) == widths(by_itself)
assert pruner.current_step == 2

# %% [markdown]
# The widths are those that the pruner would have come to by itself: what was released has been
# replaced in its layer. The pruner knows the small model; its own `regularize` and
# `pruning_history` go on as before.

# %%
figure = draw_norms(trace, events)
figure.savefig(OUT / "own-pruner-norms.png")
figure = draw_channels(dense, model)
figure.savefig(OUT / "own-pruner-channels.png")
figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
axis.plot(*zip(*curve, strict=True), color="#d55e00")
axis.set(xlabel="fine-tuning steps", ylabel="test accuracy, %")
figure.savefig(OUT / "own-pruner-accuracy.png")

# %% [markdown]
# ## Save and reload
#
# The removal saves itself with the small model. To reload, build the dense network, and give it the
# layers that it had by the same pruner, which knows how channels are taken from a `Scale`. Networks
# of PyTorch's own layers need no pruner for that: `load_pruned(path, build(), example)`.

# %%
path = OUT / "own-pruner.safetensors"
run.removed.save(path, model.eval())
saved = read(path)

again = build()
DepGraph(make_pruner(again)).lay_out(saved.removal)
again.load_state_dict(saved.tensors)
same = torch.equal(outputs(again, example), outputs(model, example))
print(f"reloaded, with the same outputs: {same}")
assert same

# %% [markdown]
# ## Where to go from here
#
# - A run is stopped and gone on with as in `depgraph.py`, beside this file: `run.state_dict()` has
#   what the pruner has counted; `load_state_dict` is called on a run of a newly made pruner.
# - Without `SmoothPruning` the run does what the pruner does by itself: a fair comparison.
# - Whole attention heads go with `prune_num_heads=True`. The network's own number of heads follows;
#   where it is kept in an unusual way, an error asks for `adapt=`, a function that does it.
