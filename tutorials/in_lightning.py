# %% [markdown]
# # In Lightning
#
# A Lightning trainer has the training loop, and you have a module. A callback does what a loop of
# your own would do: it attaches the run to the optimizers, and removes when it is time.
#
# This tutorial trains a small VGG on handwritten digits and prunes it while it trains. It goes on
# from a checkpoint, tests one of the dense and one of the small model, and saves and reloads the
# result. Every number is printed by the code.
#
# Run it as a script from the repository, `python tutorials/in_lightning.py`, or open the notebook
# of the same name.

# %%
import logging
import sys
import warnings
from pathlib import Path

sys.path.insert(0, "..")  # the repository, whether this runs in its folder tutorials
sys.path.insert(0, ".")  # or at its top

import lightning
import matplotlib.pyplot as plt
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from dpm_core import SelfRectifying, SmoothPruning
from dpm_core.adapters.base import count_macs
from dpm_core.adapters.depgraph import DepGraph, DepGraphOptions
from dpm_core.adapters.lightning import DecayPruningCallback
from dpm_core.adapters.saved import load_pruned
from experiments.inputs import data, models
from experiments.running.training import accuracy, norms_now, outputs
from tutorials.shared import draw_channels, draw_norms

torch.set_num_threads(1)  # the tensors are small: threads would wait for one another
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="lightning")  # advice about workers and devices
OUT = Path("runs/tutorials")
OUT.mkdir(parents=True, exist_ok=True)

# %% [markdown]
# ## Your module and data
#
# This is yours to replace. Nothing in it knows of pruning.

# %%
images = data.load("digits", Path("data"))
example = images.normalize(images.test[:64])


class Digits(lightning.LightningModule):
    """A classifier of digits, as one writes it for Lightning."""

    def __init__(self):
        super().__init__()
        self.net = models.build("vgg-digits", in_channels=1, classes=10, seed=0)

    def forward(self, inputs):
        return self.net(inputs)

    def training_step(self, batch, index):
        return functional.cross_entropy(self(batch[0]), batch[1])

    def test_step(self, batch, index):
        right = (self(batch[0]).argmax(1) == batch[1]).float().mean()
        self.log("right", 100 * right)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
        return [optimizer], [torch.optim.lr_scheduler.MultiStepLR(optimizer, [5], gamma=0.1)]


def loader(inputs, labels, shuffle):
    """Batches of 64."""
    return DataLoader(TensorDataset(images.normalize(inputs), labels), 64, shuffle=shuffle)


train = loader(images.train, images.train_labels, shuffle=True)
test = loader(images.test, images.test_labels, shuffle=False)

# %% [markdown]
# ## The callback
#
# It takes a function that makes the run of your module, because a checkpoint of a pruned module can
# only be loaded into a freshly built one, for which a new run is made. Here the module is trained
# for two epochs without pruning first. The training with the callback goes on from that checkpoint.


# %%
def prune(module):
    """Half of the computation goes, by decays over 30 steps; what resists is released."""
    options = DepGraphOptions(speed_up=2.0, global_pruning=False, steps=50)
    return DepGraph(module.net, example, options, SmoothPruning(30), SelfRectifying())


class Watch(Callback):
    """Accuracies and norms on the way, for the plots."""

    def __init__(self):
        self.curve, self.trace, self.events = [], [], []

    def on_train_batch_end(self, trainer, pl_module, *batch):
        if not callback.run.complete:
            self.trace.append(norms_now(callback.run.dpm))
            self.events = callback.run.events()
        if trainer.global_step % 8 == 0:
            self.curve.append((trainer.global_step, accuracy(pl_module.net, images)))


quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}


def trainer(epochs, *callbacks):
    """Lightning's, on the processor."""
    return lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", callbacks=list(callbacks), **quiet
    )


# %%
lightning.seed_everything(0, verbose=False)
dense = Digits()
before = trainer(2, ModelCheckpoint(OUT / "in-lightning-dense", filename="dense"))
before.fit(dense, train)
print(f"dense: {accuracy(dense.net, images):.1f}%")

callback, watch = DecayPruningCallback(prune), Watch()
each_epoch = ModelCheckpoint(
    OUT / "in-lightning", "{epoch}", save_top_k=-1, auto_insert_metric_name=False
)
module = Digits()
pruning = trainer(6, watch, callback, each_epoch)
pruning.fit(module, train, ckpt_path=OUT / "in-lightning-dense" / "dense.ckpt")

run = callback.run
speed_up = count_macs(dense.net, example) / count_macs(module.net, example)
print(f"pruned: {accuracy(module.net, images):.1f}%, {speed_up:.2f} times fewer MACs")
released = sum(len(e.structures) for e in watch.events if e.kind == "release")
print(f"release: {released} structures")
assert run.complete
assert speed_up >= 2

# %% [markdown]
# ## Checkpoints of every stage
#
# A checkpoint that is written with the callback says what has been removed by then. So `ckpt_path=`
# takes all of them, in `fit`, `validate`, `test` and `predict`, with a module that is built as at
# the start, and a new callback. (In the middle of the decay the accuracy is low, because the means
# and variances of BatchNorm lag behind; `depgraph.py`, beside this file, says more.)

# %%
for epoch in (2, 5):
    stage, path = Digits(), OUT / "in-lightning" / f"{epoch}.ckpt"
    again = trainer(1, DecayPruningCallback(prune))
    [result] = again.test(stage, test, ckpt_path=path, verbose=False)
    macs = count_macs(stage.net, example)
    print(f"checkpoint of epoch {epoch}: {result['right']:.1f}%, {macs / 1e6:.2f} M MACs")
    assert (macs < count_macs(dense.net, example)) == (epoch == 5)

resumed, again = Digits(), DecayPruningCallback(prune)
trainer(6, again).fit(resumed, train, ckpt_path=OUT / "in-lightning" / "2.ckpt")
print(f"resumed in the decay: {again.run.clock} of {run.clock} steps counted")
assert again.run.complete
assert again.run.clock == run.clock

# %% [markdown]
# ## What happened
#
# The pruning training's accuracies, one line for the norm of each structure, and the widths.

# %%
figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
axis.plot(*zip(*watch.curve, strict=True), color="#d55e00")
axis.set(xlabel="training steps", ylabel="test accuracy, %")
figure.savefig(OUT / "in-lightning-accuracy.png")
figure = draw_norms(watch.trace, watch.events)
figure.savefig(OUT / "in-lightning-norms.png")
figure = draw_channels(dense.net, module.net)
figure.savefig(OUT / "in-lightning-channels.png")

# %% [markdown]
# ## Save and reload
#
# What you deploy is the network. The run's removal saves it, in a file of tensors and no code, and
# the dense network takes it up again. Lightning's own `load_from_checkpoint` cannot: it builds the
# dense module and finds other shapes in the file.

# %%
path = OUT / "in-lightning.safetensors"
run.removed.save(path, module.net.eval())
small = load_pruned(path, models.build("vgg-digits", in_channels=1, classes=10), example).eval()
same = torch.equal(outputs(small, example), outputs(module.net, example))
print(f"reloaded, with the same outputs: {same}")
assert same

# %% [markdown]
# ## Where to go from here
#
# - Manual optimization, accumulation, clipping, 16-bit and schedules need nothing more.
# - Several processes: `Trainer(strategy="ddp")`. The callback wraps the smaller module anew.
# - A hearing needs batches: `DecayPruningCallback(prune, loss)`, where `loss()` runs the module on
#   the next batch and returns its mean loss.
