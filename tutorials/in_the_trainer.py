# %% [markdown]
# # In Hugging Face's Trainer
#
# The Trainer has the training loop, and you have a model of transformers. A callback attaches the
# run to the Trainer's optimizer, and removes when it is time.
#
# This tutorial trains a small vision transformer on handwritten digits, and prunes the hidden units
# of its MLPs while it trains on. It stops, goes on from a checkpoint, and saves and reloads the
# result with its configuration. Every number is printed by the code.
#
# Run it as a script from the repository, `python tutorials/in_the_trainer.py`, or open the notebook
# of the same name.

# %%
import sys
from pathlib import Path

sys.path.insert(0, "..")  # the repository, whether this runs in its folder tutorials
sys.path.insert(0, ".")  # or at its top

import torch
import transformers
from transformers import (
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from dpm_core import SelfRectifying, SmoothPruning
from dpm_core.adapters.base import count_macs, count_parameters
from dpm_core.adapters.depgraph import DepGraph, DepGraphOptions
from dpm_core.adapters.transformers import (
    DecayPruningCallback,
    load_pruned_pretrained,
    save_pruned_pretrained,
)
from experiments.inputs import data
from experiments.running.training import norms_now
from tutorials.shared import draw_norms

torch.set_num_threads(1)  # the tensors are small: threads would wait for one another
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
OUT = Path("runs/tutorials")
OUT.mkdir(parents=True, exist_ok=True)

# %% [markdown]
# ## Your model, data and Trainer
#
# This is yours to replace. Nothing in it knows of pruning.

# %%
images = data.load("digits", Path("data"))
example = {"pixel_values": images.normalize(images.test[:8])}
settings = ViTConfig(
    image_size=8,
    patch_size=2,
    num_channels=1,
    num_labels=10,
    hidden_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=96,
    initializer_range=0.15,
)


def dataset(pixels, labels):
    """As the Trainer takes it: a list of arguments of the model."""
    rows = zip(images.normalize(pixels), labels, strict=True)
    return [{"pixel_values": row, "labels": label} for row, label in rows]


def build():
    """The dense model."""
    torch.manual_seed(0)
    return ViTForImageClassification(settings)


def right(prediction):
    """The metric."""
    return {"right": 100 * float((prediction.predictions.argmax(1) == prediction.label_ids).mean())}


def trainer(model, folder, callbacks=(), **more):
    """Hugging Face's, on the processor."""
    arguments = TrainingArguments(
        str(OUT / folder),
        per_device_train_batch_size=32,
        per_device_eval_batch_size=90,
        learning_rate=3e-3,
        max_grad_norm=1.0,
        lr_scheduler_type="cosine",
        save_strategy="epoch",
        logging_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **more,
    )
    return Trainer(
        model,
        arguments,
        train_dataset=train,
        eval_dataset=test,
        compute_metrics=right,
        callbacks=list(callbacks),
    )


train, test = (
    dataset(images.train, images.train_labels),
    dataset(images.test, images.test_labels),
)
dense = build()
first = trainer(dense, "in-the-trainer-dense", num_train_epochs=3)
first.train()
print(f"dense: {first.evaluate()['eval_right']:.1f}%")

# %% [markdown]
# ## The callback
#
# The run is made of the model that the Trainer gets. A transformer's embedding goes through
# LayerNorms, in which a channel of zeros is not the same as a removed one. With
# `skip_unsupported=True` such groups are left as they are, and named.


# %%
def prune(folder, epochs, *callbacks):
    """A copy of the dense model, a run that prunes it, and the callback in a Trainer."""
    model = build()
    model.load_state_dict(dense.state_dict())
    options = DepGraphOptions(ratio=0.5, global_pruning=False, skip_unsupported=True)
    run = DepGraph(model, example, options, SmoothPruning(45), SelfRectifying())
    callback = DecayPruningCallback(run)
    return run, callback, trainer(model, folder, [*callbacks, callback], num_train_epochs=epochs)


class Watch(TrainerCallback):
    """The norms on the way, for the plot."""

    def __init__(self):
        self.trace, self.events = [], []

    def on_step_end(self, args, state, control, **others):
        if not run.complete:
            self.trace.append(norms_now(run.dpm))
            self.events = run.events()


watch = Watch()
run, callback, pruning = prune("in-the-trainer", 2, watch)
for root in run.skipped:
    print(f"left as it is: {root}")
pruning.train()

small = pruning.model
accuracy = pruning.evaluate()["eval_right"]
print(f"pruned: {accuracy:.1f}%, {run.pruned} structures removed")
print(f"MACs: {count_macs(dense, example):,} dense, {count_macs(small, example):,} pruned")
print(f"parameters: {count_parameters(dense):,} dense, {count_parameters(small):,} pruned")
released = sum(len(e.structures) for e in watch.events if e.kind == "release")
print(f"release: {released} structures")
assert run.complete
assert count_parameters(small) < count_parameters(dense)

# %% [markdown]
# ## Go on from a checkpoint
#
# Every checkpoint's folder holds the run's state, too. `callback.resume` gives the freshly built
# model the layers that it had, and returns the folder for the Trainer. Given the Trainer's own
# folder, it takes the last checkpoint in it. This one is of the middle of the decay; the training
# ends in the same bits as the one that was not stopped.

# %%
again, second, resumed = prune("in-the-trainer-resumed", 2)
middle = pruning.state.global_step // 2
folder = second.resume(OUT / "in-the-trainer" / f"checkpoint-{middle}")
resumed.train(resume_from_checkpoint=folder)
same = all(map(torch.equal, resumed.model.state_dict().values(), small.state_dict().values()))
print(f"resumed, with the same weights in the end: {same}")
assert again.removed == run.removed
assert same

# %% [markdown]
# ## What happened
#
# One line for the norm of each structure.

# %%
figure = draw_norms(watch.trace, watch.events)
figure.savefig(OUT / "in-the-trainer-norms.png")

# %% [markdown]
# ## Save and reload
#
# `from_pretrained` cannot reload the small model, because a configuration has no word for layers of
# different widths. These two functions can: the folder holds the configuration, and the small
# model's tensors with what was removed.

# %%
save_pruned_pretrained(OUT / "in-the-trainer-small", small, run.removed)
reloaded = load_pruned_pretrained(ViTForImageClassification, OUT / "in-the-trainer-small", example)
with torch.no_grad():
    same = torch.equal(reloaded(**example).logits, small.eval()(**example).logits)
print(f"reloaded, with the same outputs: {same}")
assert same

# %% [markdown]
# ## Where to go from here
#
# - Accumulation, clipping, bfloat16, schedules, `save_strategy` and `load_best_model_at_end` need
#   nothing more. The best model is looked for among the small ones.
# - Several processes are not served here, because the Trainer does not let a callback exchange the
#   parameters that its wrapper holds: see `in_lightning.py`, beside this file.
# - Your own pruner goes in as in `own_pruner.py`: `DepGraph(pruner, ...)`.
