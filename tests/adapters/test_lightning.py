"""An adapter in Lightning's Trainer: as in a loop of one's own, whatever the trainer does."""

from __future__ import annotations

import copy
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from dpm_core import Hearing, SelfRectifying, SmoothPruning
from dpm_core.adapters.base import Adapter, AdapterError, Training, UnfinishedWarning
from dpm_core.adapters.depgraph import DepGraph, DepGraphOptions
from dpm_core.adapters.saved import load_pruned
from tests.support import rounding
from tests.support.frameworks import CASES, EAGER, Drive, batch
from tests.support.ranks import COUNT, Ranks, two

lightning = pytest.importorskip("lightning")

from lightning.pytorch.callbacks import (  # noqa: E402
    EarlyStopping,
    EMAWeightAveraging,
    LearningRateFinder,
    ModelCheckpoint,
    ModelPruning,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.plugins.environments import LightningEnvironment  # noqa: E402
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy  # noqa: E402

from dpm_core.adapters.lightning import KEY, DecayPruningCallback  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
for _name in ("lightning.pytorch", "lightning.fabric"):
    logging.getLogger(_name).setLevel(logging.ERROR)

VARIANTS = ("base", "sp", "sr")
EPOCHS, PER_EPOCH = 6, 4
EXAMPLE = torch.randn(2, 8, generator=torch.Generator().manual_seed(1))
DRAW = torch.Generator().manual_seed(2)
DATA = TensorDataset(torch.randn(32, 8, generator=DRAW), torch.arange(32) % 4)


def loader(size: int = 32 // PER_EPOCH) -> DataLoader:
    return DataLoader(DATA, size)


class Net(nn.Sequential):
    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(
            nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(),
            nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4),
        )  # fmt: skip


class Lit(lightning.LightningModule):
    """A user's module; it trains ``net`` and logs its loss."""

    def __init__(self, net: nn.Module | None = None) -> None:
        super().__init__()
        self.net = Net() if net is None else net
        self.rate = 0.1

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def loss(self, batch: Any) -> Tensor:
        return functional.cross_entropy(self(batch[0]), batch[1])

    def training_step(self, batch: Any, index: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("val", self.loss(batch))

    def test_step(self, batch: Any, index: int) -> None:
        self.log("test", self.loss(batch))

    def predict_step(self, batch: Any, index: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.rate, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)]


class Manual(Lit):
    """Steps by hand with every second batch; the learning rate falls at the end of an epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, index: int) -> None:
        optimizer = self.optimizers()
        self.manual_backward(self.loss(batch) / 2)
        if index % 2:
            self.clip_gradients(optimizer, 0.3, "norm")
            optimizer.step()
            optimizer.zero_grad()

    def on_train_epoch_end(self) -> None:
        self.lr_schedulers().step()


def pruning(
    variant: str, whole: bool = False, rectify: Any = EAGER, decay: int = 5, **options: Any
) -> Any:
    """What a user gives the callback; ``whole`` prunes the LightningModule itself."""

    def make(module: Lit) -> Adapter:
        return DepGraph(
            module if whole else module.net,
            EXAMPLE.to(next(module.parameters()).dtype),
            DepGraphOptions(**{"speed_up": 1.8, "steps": 20, **options}),
            None if variant == "base" else SmoothPruning(decay),
            rectify if variant == "sr" else None,
            training=Training(EPOCHS * PER_EPOCH, PER_EPOCH),
        )

    return make


def trainer(*callbacks: Any, epochs: int = EPOCHS, **settings: Any) -> Any:
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    saves = any(isinstance(c, ModelCheckpoint) for c in callbacks)
    settings = {"accelerator": "cpu", "enable_checkpointing": saves, **settings}
    return lightning.Trainer(max_epochs=epochs, callbacks=list(callbacks), **quiet, **settings)


def every_epoch(folder: Path, **settings: Any) -> ModelCheckpoint:
    settings = {"filename": "{epoch}", "save_top_k": -1, **settings}
    return ModelCheckpoint(folder, auto_insert_metric_name=False, **settings)


def assert_same(one: nn.Module, other: nn.Module) -> None:
    left, right = one.state_dict(), other.state_dict()
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


# ---------------------------------------------------------------------- as in a loop


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", [Lit, Manual])
def test_a_training_ends_in_the_same_bits_as_a_loop(variant, kind):
    """With accumulation, clipping and a schedule; in both kinds of optimization."""
    module, callback = kind(), DecayPruningCallback(pruning(variant, decay=4))
    settings = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.3} if kind is Lit else {}
    trainer(callback, **settings).fit(module, loader())

    alone = Lit()
    run = pruning(variant, decay=4)(alone)
    [optimizer], [scheduler] = alone.configure_optimizers()
    run.attach(optimizer)
    for _ in range(EPOCHS):
        for index, given in enumerate(loader()):
            if run.due:
                run.remove()
            (alone.loss(given) / 2).backward()
            if index % 2:
                torch.nn.utils.clip_grad_norm_(alone.parameters(), 0.3)
                optimizer.step()
                optimizer.zero_grad()
        scheduler.step()
    if run.due:
        run.remove()
    assert callback.run.removed == run.removed
    assert len(run.removed) == 2
    assert callback.run.clock == EPOCHS * PER_EPOCH // 2
    assert_same(module, alone)


# A ranking by gradients draws batches of its own, which the trainer's loader would not skip.
LEFT_OUT = {"depgraph", "depgraph-mixed", "depgraph-sparse", "depgraph-taylor"}
LOOPS = [c for c in CASES if c.name not in LEFT_OUT]


@pytest.mark.parametrize("case", LOOPS, ids=lambda c: c.name)
def test_every_framework_does_in_a_trainer_what_it_does_in_a_loop(case):
    drive = Drive(case, case.adapter(case.build(), "sr")).run()
    module = Lit(case.build())
    callback = DecayPruningCallback(lambda module: case.adapter(module.net, "sr"))
    module.configure_optimizers = lambda: case.new_optimizer(callback.run)
    batches = [batch(number) for number in range(drive.steps)]
    trainer(callback, epochs=1).fit(module, DataLoader(batches, batch_size=None))
    assert callback.run.removed == drive.adapter.removed
    assert_same(module.net, drive.model)


@pytest.mark.parametrize("whole", [True, False])
def test_a_hearings_batches_come_from_the_user(whole):
    module = Lit()
    fixed = next(iter(loader()))
    criterion = SelfRectifying(Hearing(batches=2), max_share=0.4)
    make = pruning("sr", whole, criterion, decay=4)
    callback = DecayPruningCallback(make, lambda: module.loss(fixed))
    trainer(callback).fit(module, loader())
    assert callback.run.heard
    assert callback.run.removed


def test_two_optimizers_of_which_one_trains_the_adapters_model():
    class Two(Lit):
        def __init__(self) -> None:
            super().__init__()
            self.other = nn.Linear(4, 4)
            self.automatic_optimization = False

        def training_step(self, batch: Any, index: int) -> None:
            first, second = self.optimizers()
            for one, loss in ((second, self.other(self(batch[0])).square().mean()), (first, 0)):
                one.zero_grad()
                self.manual_backward(loss + self.loss(batch))
                one.step()

        def configure_optimizers(self) -> Any:
            parts = (self.net, self.other)
            return [torch.optim.SGD(part.parameters(), lr=0.1) for part in parts]

    module, callback = Two(), DecayPruningCallback(pruning("sp"))
    trainer(callback).fit(module, loader())
    assert callback.run.removed
    assert callback.run.clock == EPOCHS * PER_EPOCH


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "16-true", "64-true"])
def test_other_precisions(precision):
    """Where it is no mixed one, the trainer changes the module's type after the adapter is made."""
    module, callback = Lit(), DecayPruningCallback(pruning("sr"))
    trainer(callback, precision=precision).fit(module, loader())
    assert callback.run.removed
    types = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}
    assert module.net[0].weight.dtype == types.get(precision, torch.float32)
    single = Lit()
    trainer(DecayPruningCallback(pruning("sr")), precision="32-true").fit(single, loader())
    assert not torch.equal(module.net[5].bias.float(), single.net[5].bias)


# ---------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize(
    ("variant", "rounds", "whole"),
    [("base", 2, False), ("sp", 2, False), ("sr", 2, False), ("sr", 1, True)],
)
def test_resumed_from_any_checkpoint_it_ends_in_the_same_bits(tmp_path, variant, rounds, whole):
    """Before, in and after a decay and a removal: of the second round, which starts with epoch 3.

    After epoch 0 the first decay is on its way, after epoch 2 its removal is done.
    """
    options = {"rounds": rounds, "round_epochs": 3, "global_pruning": False}

    def fit(path: Path | None, *more: Any) -> tuple[Lit, DecayPruningCallback]:
        callback = DecayPruningCallback(pruning(variant, whole, **options))
        module = Lit()
        trainer(callback, *more, precision="bf16-mixed").fit(module, loader(), ckpt_path=path)
        return module, callback

    module, callback = fit(None, every_epoch(tmp_path))
    shapes = set()
    for epoch in range(EPOCHS - 1):
        path = tmp_path / f"{epoch}.ckpt"
        weights = torch.load(path, weights_only=True)["state_dict"]
        shapes.add(tuple(weights[f"net.{k}.weight"].shape for k in (0, 3, 5)))
        other, resumed = fit(path)
        assert resumed.run.removed == callback.run.removed
        assert_same(other, module)
    shapes.add(tuple(module.net[k].weight.shape for k in (0, 3, 5)))
    assert len(shapes) == rounds + (variant != "base")
    assert len(callback.run.removed) == 2 * rounds


@pytest.mark.parametrize("only", [True, False])
def test_every_stage_takes_a_checkpoint_of_any_stage(tmp_path, only):
    """Also one of the weights alone, and one that was saved after the training."""
    saver = every_epoch(tmp_path, save_weights_only=only)
    module, fitted = Lit(), trainer(DecayPruningCallback(pruning("sp")), saver)
    fitted.fit(module, loader())
    fitted.save_checkpoint(tmp_path / f"{EPOCHS}.ckpt")
    for epoch in (0, 1, EPOCHS):
        path, losses = tmp_path / f"{epoch}.ckpt", []
        for stage in ("validate", "test"):
            again = trainer(DecayPruningCallback(pruning("sp")))
            getattr(again, stage)(Lit(), loader(), ckpt_path=path, verbose=False)
            losses.append(
                float(again.callback_metrics[stage[: -5 if stage == "validate" else None]])
            )
        assert losses[0] == losses[1]
        fresh = Lit()
        predicted = trainer(DecayPruningCallback(pruning("sp"))).predict(
            fresh, loader(), ckpt_path=path
        )
        assert (fresh.net[0].out_features < 16) == (epoch > 0)
    module.eval()
    assert all(torch.equal(p, module(x)) for p, (x, _) in zip(predicted, loader(), strict=True))


def test_what_was_tested_can_be_trained_on(tmp_path):
    module, callback = Lit(), DecayPruningCallback(pruning("sp"))
    trainer(callback, every_epoch(tmp_path)).fit(module, loader())
    for epoch in (0, 1):
        other, again = Lit(), DecayPruningCallback(pruning("sp"))
        path = tmp_path / f"{epoch}.ckpt"
        trainer(again).test(other, loader(), ckpt_path=path, verbose=False)
        trainer(again).fit(other, loader(), ckpt_path=path)
        assert_same(other, module)


def test_the_best_checkpoint_is_one_of_a_small_model(tmp_path):
    """Dense models are better here: their monitored value falls with the epochs."""

    class Rising(Lit):
        def validation_step(self, batch: Any, index: int) -> None:
            self.log("val", float(self.current_epoch))

    best = every_epoch(tmp_path, monitor="val", mode="min", save_top_k=1)
    module = Rising()
    fitted = trainer(DecayPruningCallback(pruning("sp")), best)
    fitted.fit(module, loader(), loader())
    assert Path(best.best_model_path).name == "1.ckpt"
    assert {p.name for p in tmp_path.iterdir()} == {"0.ckpt", "1.ckpt"}
    fitted.test(dataloaders=loader(), ckpt_path="best", verbose=False)
    assert float(best.best_model_score) == 1


@pytest.mark.parametrize("mode", ["min", "max"])
def test_a_training_is_not_stopped_because_dense_models_were_better(mode):
    """Lightning's EarlyStopping keeps its best over stages (issue 18727; neuralforecast 1529)."""
    sign = 1 if mode == "min" else -1

    class Better(Lit):
        def validation_step(self, batch: Any, index: int) -> None:
            epoch = self.current_epoch
            self.log("val", sign * (0.0 if epoch == 0 else 10.0 - epoch))

    fitted = trainer(
        DecayPruningCallback(pruning("sp")), EarlyStopping("val", patience=2, mode=mode)
    )
    fitted.fit(Better(), loader(), loader())
    assert fitted.current_epoch == EPOCHS


def test_a_training_that_breaks_off_leaves_module_and_optimizer(tmp_path):
    """Lightning calls no teardown then; what it saves at that moment can be gone on with."""

    class Breaking(Lit):
        def training_step(self, batch: Any, index: int) -> Tensor:
            if self.global_step == 7:
                raise ZeroDivisionError
            return super().training_step(batch, index)

    module, callback = Breaking(), DecayPruningCallback(pruning("sp"))
    saver = OnExceptionCheckpoint(tmp_path, "last")
    breaking = trainer(callback, saver, enable_checkpointing=True)
    with pytest.raises(ZeroDivisionError):
        breaking.fit(module, loader())
    assert callback.run.removed
    assert not {"load_checkpoint", "save_checkpoint"} & vars(breaking.strategy).keys()
    assert not callback.run.optimizer._optimizer_step_pre_hooks
    other, again = Lit(), DecayPruningCallback(pruning("sp"))
    trainer(again).fit(other, loader(), ckpt_path=tmp_path / "last.ckpt")
    assert again.run.removed == callback.run.removed


class Copying(lightning.Callback):
    """Copies the module in a step, by ``copy.deepcopy`` or by its bytes, as averages do."""

    def __init__(self, by: str, step: int) -> None:
        self.by, self.step, self.copy = by, step, None

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *batch: Any) -> None:
        if trainer.global_step == self.step:
            if self.by == "deepcopy":
                self.copy = copy.deepcopy(pl_module)
            else:
                file = io.BytesIO()
                torch.save(pl_module, file)
                file.seek(0)
                self.copy = torch.load(file, weights_only=False)  # a whole module, of this test


@pytest.mark.parametrize("by", ["deepcopy", "save"])
@pytest.mark.parametrize("step", [3, 12])
def test_a_copy_that_is_taken_in_a_training_is_a_module_by_itself(by, step, tmp_path):
    """It saves and loads what it is itself, whatever becomes of the original."""
    copying, callback = Copying(by, step), DecayPruningCallback(pruning("sp"))
    module = Lit()
    trainer(callback, copying).fit(module, loader())
    assert callback.run.removed
    taken, path = copying.copy, tmp_path / "copy.ckpt"
    small = step == 12
    assert (taken.net[0].weight.shape == module.net[0].weight.shape) == small
    alone = trainer(epochs=1)
    alone.fit(taken, loader())
    alone.save_checkpoint(path)
    assert KEY not in torch.load(path, weights_only=True)
    other = copy.deepcopy(module) if small else Lit()
    trainer().test(other, loader(), ckpt_path=path, verbose=False)
    assert_same(other, taken)


def test_a_module_that_looks_into_a_checkpoint_finds_its_layers_as_they_were_then(tmp_path):
    """Also where it keeps weights of its own there, and where these alone are saved."""

    class Keeping(Lit):
        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["first"] = self.net[0].weight.detach().clone()

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            self.first = torch.empty_like(self.net[0].weight).copy_(checkpoint["first"])

    module, callback = Keeping(), DecayPruningCallback(pruning("sp"))
    saves = every_epoch(tmp_path, save_weights_only=True)
    trainer(callback, saves).fit(module, loader())
    other = Keeping()
    again = DecayPruningCallback(pruning("sp"))
    last = tmp_path / f"{EPOCHS - 1}.ckpt"
    trainer(again).test(other, loader(), ckpt_path=last, verbose=False)
    assert_same(other, module)
    assert torch.equal(other.first, module.net[0].weight)


def test_a_training_with_dhspg_ends_with_its_removal(tmp_path):
    """A checkpoint from after it gives its model, and cannot be gone on with: DHSPG is over."""
    case = next(c for c in CASES if c.name == "otov2")

    class Choosing(Lit):
        def training_step(self, index: Tensor, _: int) -> Tensor:
            return functional.cross_entropy(self.net(batch(int(index))[0]), batch(int(index))[1])

        def configure_optimizers(self) -> Any:
            return self.run[0].dhspg(variant="sgd", lr=case.learning_rate)

        test_step = training_step

    def made(module: Any) -> Adapter:
        module.run = (case.adapter(module.net, "sp"),)
        return module.run[0]

    def going_on() -> tuple[Any, Any]:
        return Choosing(case.build()), DecayPruningCallback(made)

    data, path = DataLoader(torch.arange(case.stages["prune"])), tmp_path / "end.ckpt"
    module, callback = going_on()
    whole = trainer(callback, epochs=1)
    whole.fit(module, data)
    whole.save_checkpoint(path)
    assert callback.run.removed
    other, again = going_on()
    trainer(again).test(other, data, ckpt_path=path, verbose=False)
    assert_same(other, module)
    other, again = going_on()
    with pytest.raises(AdapterError, match=r"another optimizer of model.parameters"):
        trainer(again, epochs=2).fit(other, data, ckpt_path=path)


def test_a_dense_training_is_gone_on_with(tmp_path):
    """From a checkpoint that knows nothing of pruning: it begins then."""
    trainer(every_epoch(tmp_path), epochs=2).fit(Lit(), loader())
    callback = DecayPruningCallback(pruning("sp"))
    trainer(callback).fit(Lit(), loader(), ckpt_path=tmp_path / "1.ckpt")
    assert callback.run.clock == (EPOCHS - 2) * PER_EPOCH
    assert callback.run.removed


def test_the_small_model_is_saved_and_reloaded(tmp_path):
    module, callback = Lit(), DecayPruningCallback(pruning("sr"))
    trainer(callback).fit(module, loader())
    callback.run.removed.save(tmp_path / "small.safetensors", callback.run.model)
    assert_same(load_pruned(tmp_path / "small.safetensors", Net(), EXAMPLE), module.net)
    copy.deepcopy(module)
    torch.save(module, tmp_path / "module.pt")  # nothing of ours is left in it


def test_trained_on_and_used_again():
    """The same trainer's second fit, and another module with the same callback."""
    callback = DecayPruningCallback(pruning("sp"))
    module, first = Lit(), trainer(callback, epochs=1)
    with pytest.warns(UnfinishedWarning, match="structures still decay"):
        first.fit(module, loader())
    assert not callback.run.removed
    first.fit_loop.max_epochs = 3
    with warnings.catch_warnings(record=True) as given:
        first.fit(module, loader())
    assert not [w for w in given if w.category is UnfinishedWarning]
    assert callback.run.removed
    before, other = callback.run, Lit()
    trainer(callback, epochs=1).fit(other, loader())
    assert callback.run is not before
    assert not callback.run.removed
    trainer(epochs=1).fit(module, loader())  # small, and without a callback
    assert module.net[0].out_features < 16


def test_a_learning_rate_is_looked_for_before():
    """The finder saves and loads a checkpoint of its own before pruning starts."""
    module, callback = Lit(), DecayPruningCallback(pruning("sp"))
    finder = LearningRateFinder(num_training_steps=10, attr_name="rate")
    trainer(callback, finder).fit(module, loader())
    assert callback.run.removed
    assert callback.run.clock == EPOCHS * PER_EPOCH


# ---------------------------------------------------------------------- several processes


class _Started(LightningEnvironment):
    """The processes are there."""

    creates_processes_externally = True


def train(
    rank: int, variant: str, folder: Path, path: Path | None, count: int = COUNT
) -> tuple[dict[str, Tensor], list[Any], int]:
    """Without BatchNorm, which normalises over a process's share of the batch."""
    net = Net()
    net[1] = nn.Identity()
    module, callback = Lit(net.double()), DecayPruningCallback(pruning(variant))
    wrappers: list[int] = []

    def look(*_: Any) -> None:
        wrapper = module.trainer.strategy.model
        if not hasattr(wrapper, "seen"):
            wrapper.seen = True
            wrappers.append(1)

    module.on_train_batch_start = look
    images, labels = DATA.tensors
    data = TensorDataset(images.double(), labels)
    # Lightning's own sampler would shuffle.
    share = DistributedSampler(data, count, rank, shuffle=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_RANK", str(rank))
        strategy = DDPStrategy(cluster_environment=_Started()) if count > 1 else "auto"
        settings = {"devices": count, "strategy": strategy, "use_distributed_sampler": False}
        given = trainer(callback, every_epoch(folder), **settings)
        batches = DataLoader(data, 32 // PER_EPOCH // count, sampler=share)
        given.fit(module, batches, ckpt_path=path)
    return module.state_dict(), list(callback.run.removed), len(wrappers)


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with two() as started:
        yield started


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_two_processes_end_as_one_does(tmp_path, ranks, variant):
    """Also resumed from before and after the removal, after which the model is wrapped anew."""
    alone, removed, _ = train(0, variant, tmp_path / "1", None, count=1)
    for epoch in (None, 0, 2):
        path = None if epoch is None else tmp_path / f"{epoch}.ckpt"
        found = ranks.results(
            train, variant, tmp_path / f"from {epoch}" if path else tmp_path, path
        )
        for weights, taken, wrappers in found:
            assert dict(taken) == dict(removed)
            assert wrappers == (1 if variant == "base" or epoch == 2 else 2)
            for name, value in weights.items():
                rounding.assert_exact(value, alone[name])
                assert torch.equal(value, found[0][0][name])


def gated(rank: int, case: Any) -> tuple[dict[str, Tensor], list[Any]]:
    module = Lit(case.build())
    callback = DecayPruningCallback(lambda module: case.adapter(module.net, "sp"))
    module.configure_optimizers = lambda: case.new_optimizer(callback.run)
    batches = [batch(number) for number in range(case.stages["prune"])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_RANK", str(rank))
        strategy = DDPStrategy(cluster_environment=_Started())
        settings = {"devices": COUNT, "strategy": strategy, "use_distributed_sampler": False}
        given = trainer(callback, epochs=1, **settings)
        given.fit(module, DataLoader(batches, batch_size=None))
    return module.state_dict(), list(callback.run.removed)


@pytest.mark.slow
def test_layers_that_freeze_and_thaw_in_two_processes(ranks):
    """Gate-Decorator trains gates alone now and then; both have the same batches as one alone."""
    [case] = [c for c in CASES if c.name == "gate-decorator"]
    drive = Drive(case, case.adapter(case.build(), "sp")).run()
    for weights, removed in ranks.results(gated, case):
        assert removed == list(drive.adapter.removed)
        assert weights.keys() == Lit(drive.model).state_dict().keys()


# ---------------------------------------------------------------------- what is refused


def assert_refused(match: str, callback: Any, *more: Any, module: Any = None, **fit: Any) -> None:
    module = module or Lit()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(AdapterError, match=match):
        trainer(callback, *more).fit(module, loader(), **fit)
    assert all(torch.equal(value, before[k]) for k, value in module.state_dict().items())


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ([StochasticWeightAveraging(0.1)], "averages"),
        ([EMAWeightAveraging()], "averages"),
        ([ModelPruning("l1_unstructured")], "ModelPruning masks"),
        ([DecayPruningCallback(pruning("sp"))], "has several"),
    ],
)
def test_other_callbacks_that_contradict_are_refused(more, match):
    assert_refused(match, DecayPruningCallback(pruning("sp")), *more)


@pytest.mark.parametrize("name", ["ddp_spawn", "ddp_fork", "ddp_notebook"])
def test_strategies_that_copy_weights_back_are_refused(name):
    callback = DecayPruningCallback(pruning("sp"))
    with pytest.raises(AdapterError, match=r"copies weights back .* take strategy='ddp'"):
        callback.setup(trainer(callback, strategy=name, devices=2), Lit(), "fit")


def test_sharding_is_refused(monkeypatch):
    callback = DecayPruningCallback(pruning("sp"))
    given = trainer(callback)
    monkeypatch.setattr(type(given), "strategy", ModelParallelStrategy())
    with pytest.raises(AdapterError, match=r"ModelParallelStrategy .* take strategy='ddp'"):
        callback.setup(given, Lit(), "fit")


def test_an_adapter_of_another_module_is_refused():
    run = pruning("sp")(Lit())
    for given in (run, lambda module: run, lambda module: None):
        assert_refused("has no adapter of this module", DecayPruningCallback(given))


def test_checkpoints_that_do_not_fit_are_refused(tmp_path):
    module, callback = Lit(), DecayPruningCallback(pruning("sp"))
    trainer(callback, every_epoch(tmp_path)).fit(module, loader())
    small, dense = tmp_path / "3.ckpt", tmp_path / "0.ckpt"
    of_dense = torch.load(dense, weights_only=True)
    del of_dense[KEY]
    torch.save(of_dense, tmp_path / "dense.ckpt")
    of_small = torch.load(small, weights_only=True)
    del of_small[KEY]
    torch.save(of_small, tmp_path / "small.ckpt")
    fresh = DecayPruningCallback(pruning("sp"))
    assert_refused("tells of no removal", fresh, ckpt_path=tmp_path / "small.ckpt")
    assert_refused(
        "tells of no removal", callback, module=module, ckpt_path=tmp_path / "dense.ckpt"
    )
    assert_refused("pruned already.*freshly built", callback, module=module, ckpt_path=dense)
    trainer(callback).fit(module, loader(), ckpt_path=small)


def test_with_an_adapter_instead_of_a_function(tmp_path):
    module = Lit()
    callback = DecayPruningCallback(pruning("sp")(module))
    trainer(callback, every_epoch(tmp_path), epochs=1).fit(module, loader())
    assert_refused(
        "pruned already.*a function", callback, module=module, ckpt_path=tmp_path / "0.ckpt"
    )
    other = Lit()
    again = DecayPruningCallback(pruning("sp")(other))
    trainer(again).fit(other, loader(), ckpt_path=tmp_path / "0.ckpt")
    assert again.run.removed
