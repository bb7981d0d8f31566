"""Lightning: a callback around an adapter.

::

    callback = DecayPruningCallback(lambda module: DepGraph(module.net, example, options, smooth))
    Trainer(max_epochs=30, callbacks=[callback]).fit(Classifier(), data)  # or ckpt_path=...
    callback.run.removed.save("small.safetensors", callback.run.model)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from lightning.pytorch import callbacks, strategies
from torch.nn.parallel import DistributedDataParallel

from .base import Adapter, AdapterError, Loss
from .removal import Removal

KEY = "decay_pruning"  # under which a checkpoint holds the adapter's state


class DecayPruningCallback(callbacks.Callback):
    """Attaches an adapter to a training, and removes when it is time.

    A removal follows at the end of the batch in which it becomes due; without smoothing, before the
    first. From then on ``ModelCheckpoint`` and ``EarlyStopping`` look for the best of the small
    models. By ``ckpt_path`` a freshly built module gets, in every stage, the layers that it
    had then; ``load_from_checkpoint`` cannot do that: reload what ``Removal.save`` wrote.

    Args:
        run: the adapter, or a function that makes it of the LightningModule before that is on its
            device, when all layers are there (none in ``configure_model``). The attribute of this
            name is the adapter, or ``None`` until it is made.
        loss: for :class:`~dpm_core.Hearing` and :class:`~dpm_core.Exchange`: as of ``attach()``.

    Raises:
        AdapterError: in ``fit``, naming what does not fit: strategy, callbacks, module, checkpoint.
    """

    def __init__(self, run: Adapter | Callable[[Any], Adapter], loss: Loss | None = None) -> None:
        self._make = None if isinstance(run, Adapter) else run
        self.run: Any = run if isinstance(run, Adapter) else None
        self._loss, self._trained = loss, set[Any]()  # what DistributedDataParallel knows

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Make the adapter, and be there when the module loads and saves."""
        self.teardown(trainer, pl_module, stage)
        if stage == "fit":
            _require_served(trainer)
            self._own(pl_module)
        # A callback's own come late, and not for weights alone; a module's would be in its copies.
        files, keep = trainer.strategy, self.on_save_checkpoint
        loads, saves = files.load_checkpoint, files.save_checkpoint
        lay_out: Any = partial(self._lay_out, pl_module, stage == "fit")
        files.load_checkpoint = lambda *a, **k: lay_out(loads(*a, **k))
        files.save_checkpoint = lambda c, *a, **k: (keep(trainer, pl_module, c), saves(c, *a, **k))

    def teardown(self, trainer: Any, pl_module: Any, stage: Any) -> None:
        """Leave module, optimizers and trainer."""
        for name in ("load_checkpoint", "save_checkpoint"):
            vars(trainer.strategy).pop(name, None)
        if self.run is not None:
            self.run.finish()

    on_exception = teardown  # a trainer that is interrupted calls this alone

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Save the adapter's state, too."""
        if self.run is not None and self.run.is_of(pl_module):
            checkpoint[KEY] = self.run.state_dict()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Attach to the optimizers of the adapter's model."""
        self._trained = {p for p in pl_module.parameters() if p.requires_grad}
        self.run.attach(trainer.optimizers, self._loss)
        self.on_train_batch_end(trainer, pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *batch: Any) -> None:
        """Remove, if it is time."""
        if self.run.due:
            self.run.remove()
            for one in trainer.callbacks:
                if isinstance(one, callbacks.ModelCheckpoint) and one.monitor is not None:
                    one.best_k_models, one.best_model_score = {}, None
                    one.best_model_path = one.kth_best_model_path = ""
                if isinstance(one, callbacks.EarlyStopping):
                    worst = "inf" if one.mode == "min" else "-inf"
                    one.best_score, one.wait_count = one.best_score.new_tensor(float(worst)), 0
        known, self._trained = self._trained, {p for p in pl_module.parameters() if p.requires_grad}
        if known != self._trained and isinstance(trainer.strategy.model, DistributedDataParallel):
            trainer.strategy.model = pl_module  # the old wrapper lets go of its parameters first
            trainer.strategy.configure_ddp()

    def _own(self, module: Any) -> Any:
        if self._make is not None and not (self.run and self.run.is_of(module)):
            self.run = self._make(module)
        if isinstance(self.run, Adapter) and self.run.is_of(module):
            return self.run
        raise AdapterError("the callback has no adapter of this module; give a function for one")

    def _lay_out(self, module: Any, fitting: bool, checkpoint: Mapping[str, Any]) -> Any:
        """Give a module the layers that it had when a checkpoint was saved; return that."""
        state, own = checkpoint.get(KEY), module.state_dict()
        if state is None:
            for name, value in checkpoint["state_dict"].items():
                if name in own and getattr(value, "shape", ()) != getattr(own[name], "shape", ()):
                    raise AdapterError(
                        f"{name!r} has another shape in the checkpoint, which tells of no removal; "
                        "save with DecayPruningCallback, or give the module that was saved"
                    )
            return checkpoint
        removed = None if state["removed"] is None else Removal(state["removed"])
        run = self._own(module)
        if run.removed == removed and (run.complete or not fitting):
            return checkpoint
        if run.removed is not None or (run.optimizers and self._make is None):
            raise AdapterError(
                "the module has been pruned already, and the checkpoint is of another stage; "
                "give a freshly built module, and DecayPruningCallback a function"
            )
        if run.optimizers and self._make is not None:  # it was attached in an earlier training
            run.detach()
            self.run = run = self._make(module)
        run.load_state_dict(state)
        return checkpoint


def _require_served(trainer: Any) -> None:
    """Refuse what holds on to the large model."""
    s, strategy, others = strategies, trainer.strategy, trainer.callbacks
    served = isinstance(strategy, s.SingleDeviceStrategy | s.DDPStrategy)
    derived = s.DeepSpeedStrategy | s.XLAStrategy | s.SingleDeviceXLAStrategy
    averages = callbacks.StochasticWeightAveraging | callbacks.WeightAveraging
    if not served or isinstance(strategy, derived):
        why = f"{type(strategy).__name__} keeps parameters in its own form; take strategy='ddp'"
    elif getattr(strategy, "_start_method", "popen") != "popen":
        why = "the strategy copies weights back into a dense model at the end; take strategy='ddp'"
    elif any(isinstance(c, averages) for c in others):
        why = "averages of weights would go across a removal; average in a training after it"
    elif any(isinstance(c, callbacks.ModelPruning) for c in others):
        why = "ModelPruning masks weights that a removal would have to divide; give one of the two"
    elif sum(isinstance(c, DecayPruningCallback) for c in others) > 1:
        why = "it has several DecayPruningCallbacks; give one"
    else:
        return
    raise AdapterError(f"this trainer cannot prune: {why}")
