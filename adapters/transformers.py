"""Hugging Face's Trainer: a callback around an adapter, and the pruned model's folder.

::

    run = DepGraph(model, example, DepGraphOptions(speed_up=2.0), SmoothPruning(200))
    callback = DecayPruningCallback(run)
    trainer = Trainer(model, arguments, train_dataset=data, callbacks=[callback])
    trainer.train()  # or resume_from_checkpoint=callback.resume("the trainer's folder")
    save_pruned_pretrained("small", model, run.removed)

    model = load_pruned_pretrained(BertForSequenceClassification, "small", example)

``from_pretrained`` alone cannot: a configuration has no word for layers of different widths.
"""

from __future__ import annotations

import pickle
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint
from transformers.training_args import ParallelMode

from .base import Adapter, AdapterError, Loss
from .removal import Removal
from .saved import read, save_pruned, write

STATE = "decay_pruning.pt"  # the adapter's state, in every checkpoint's folder
PRUNED = "pruned.safetensors"  # the pruned model, in the folder of save_pruned_pretrained()


class DecayPruningCallback(TrainerCallback):
    """Attaches an adapter to a training, and removes when it is time.

    A removal follows at the end of the step in which it becomes due; without smoothing, before the
    first step. From then on ``load_best_model_at_end`` looks for the best of the small models.

    Args:
        run: the adapter of the trainer's model, made before the trainer. Also an attribute.
        loss: for :class:`~dpm_core.Hearing` and :class:`~dpm_core.Exchange`: as of ``attach()``.

    Raises:
        AdapterError: in ``train()``: the adapter is of another model; several processes, FSDP or
            DeepSpeed; or a checkpoint without :meth:`resume`.
    """

    def __init__(self, run: Adapter, loss: Loss | None = None) -> None:
        self.run, self._loss, self._resumed = run, loss, False

    def resume(self, folder: str | Path) -> str:
        """Give the model the layers that it had when a checkpoint was saved.

        Args:
            folder: the checkpoint's; or the trainer's, for the last checkpoint in it.

        Returns:
            The checkpoint's folder, for ``trainer.train(resume_from_checkpoint=...)``.

        Raises:
            AdapterError: there is none, or it was saved without this callback; or the adapter has
                been attached already.
        """
        try:
            if not (Path(folder) / STATE).exists():
                folder = get_last_checkpoint(folder) or folder
            state = torch.load(Path(folder) / STATE, map_location="cpu", weights_only=True)
        except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as cause:
            raise AdapterError(
                f"{Path(folder) / STATE} cannot be read ({type(cause).__name__}): there is no "
                "complete checkpoint, or it was saved without DecayPruningCallback; take another "
                "one, or load its weights into the model and start a training"
            ) from cause
        self.run.load_state_dict(state)
        self._resumed = True
        return str(folder)

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any, optimizer: Any, **others: Any
    ) -> None:
        """Attach."""
        if not self.run.is_of(model):
            why = "the adapter is of another model than the trainer's; make it of the trainer's"
        elif args.parallel_mode is ParallelMode.DISTRIBUTED or args.fsdp or args.deepspeed:
            why = (
                "several processes, FSDP and DeepSpeed hold on to parameters that a removal takes, "
                "and the Trainer does not let a callback exchange them; train in one process, or "
                "with DistributedDataParallel in a loop of your own or in Lightning"
            )
        elif bool(state.global_step) != self._resumed:
            why = "going on takes both: train(resume_from_checkpoint=callback.resume(folder))"
        else:
            if isinstance(model, PreTrainedModel):  # the Trainer loads by the model's names alone
                model.save_pretrained = partial(model.save_pretrained, save_original_format=False)
            self.run.attach(optimizer, self._loss)
            return self.on_step_end(args, state, control)
        raise AdapterError(why)

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Remove, if it is time."""
        if self.run.due:
            self.run.remove()
            state.best_metric = state.best_global_step = state.best_model_checkpoint = None

    def on_save(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Save the adapter's state, too."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if args.should_save:
            write(folder / STATE, lambda file: torch.save(self.run.state_dict(), file))

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any, **others: Any) -> None:
        """Leave model and optimizer."""
        vars(model).pop("save_pretrained", None)
        self.run.finish()
        self._resumed = False


def save_pruned_pretrained(folder: str | Path, model: Any, removal: Removal) -> None:
    """Write a pruned model of transformers, and its configuration, to a folder.

    Raises:
        SavedModelError, OSError: see :func:`.saved.save_pruned`.
    """
    save_pruned(Path(folder) / PRUNED, model, removal)
    model.config.save_pretrained(folder)


def load_pruned_pretrained(kind: Any, folder: str | Path, example: Any) -> Any:
    """What :func:`save_pruned_pretrained` wrote, as a model in evaluation mode.

    Args:
        kind: the model's class, or one of transformers' ``AutoModelFor...``.
        folder: that was written to.
        example: of its inputs, on the host.

    Returns:
        The model, with the types that the file has.

    Raises:
        SavedModelError: see :func:`.saved.load_pruned`.
        OSError: a file is not there, or cannot be read.
    """
    saved = read(Path(folder) / PRUNED)
    model = getattr(kind, "from_config", kind)(AutoConfig.from_pretrained(folder))
    types = {t.dtype for t in saved.tensors.values() if t.is_floating_point()}
    if len(types) == 1:
        model = model.to(types.pop())
    return saved.load_into(model, example).eval()
