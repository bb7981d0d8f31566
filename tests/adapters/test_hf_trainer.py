"""An adapter in Hugging Face's Trainer, and a pruned model's folder."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from dpm_core import Hearing, SelfRectifying, SmoothPruning
from dpm_core.adapters.base import Adapter, AdapterError, Training, UnfinishedWarning
from dpm_core.adapters.depgraph import DepGraph, DepGraphOptions
from dpm_core.adapters.saved import MismatchError, SavedModelError
from tests.support.frameworks import CASES, EAGER, Drive, batch

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from transformers import (  # noqa: E402
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.training_args import ParallelMode  # noqa: E402

from dpm_core.adapters.transformers import (  # noqa: E402
    STATE,
    DecayPruningCallback,
    load_pruned_pretrained,
    save_pruned_pretrained,
)

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

VARIANTS = ("base", "sp", "sr")
STEPS, EVERY = 16, 4
IDS = torch.randint(1, 50, (32, 8), generator=torch.Generator().manual_seed(1))
EXAMPLE = {"input_ids": IDS[:2]}
DATA = [{"input_ids": ids, "labels": i % 3} for i, ids in enumerate(IDS)]
UNITS = "bert.encoder.layer.0.intermediate.dense"


def bert() -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=16,
        num_labels=3,
    )
    return BertForSequenceClassification(config)  # with dropout


def pruning(model: nn.Module, variant: str, rectify: Any = EAGER, decay: int = 6) -> Adapter:
    return DepGraph(
        model,
        EXAMPLE,
        DepGraphOptions(ratio=0.5, skip_unsupported=True, global_pruning=False),
        None if variant == "base" else SmoothPruning(decay),
        rectify if variant == "sr" else None,
        training=Training(STEPS),
    )


def arguments(folder: Path, **settings: Any) -> TrainingArguments:
    usual = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_grad_norm": 0.5,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "save_steps": EVERY,
        "report_to": [],
        "logging_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return TrainingArguments(str(folder), **{**usual, **settings})


def fit(
    folder: Path, run: Adapter, path: Any = None, *more: Any, **settings: Any
) -> DecayPruningCallback:
    callback = DecayPruningCallback(run)
    given = Trainer(
        run.model,
        arguments(folder, **settings),
        train_dataset=DATA,
        eval_dataset=DATA[:8],
        callbacks=[callback, *more],
    )
    given.train(resume_from_checkpoint=callback.resume(path) if path else None)
    return callback


def assert_same(one: nn.Module, other: nn.Module) -> None:
    left, right = one.state_dict(), other.state_dict()
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_resumed_from_any_checkpoint_it_ends_in_the_same_bits(tmp_path, variant):
    """In a decay, after it, and after the removal; with dropout, accumulation and a schedule."""
    model = bert()
    run = fit(tmp_path, pruning(model, variant)).run
    assert run.clock == STEPS
    assert len(dict(run.removed)[UNITS]) == 12
    assert model.get_submodule(UNITS).out_features == 12
    for step in range(EVERY, STEPS, EVERY):
        other = bert()
        again = fit(tmp_path / "2", pruning(other, variant), tmp_path / f"checkpoint-{step}").run
        assert again.removed == run.removed
        assert_same(other, model)
    weights = [tmp_path / f"checkpoint-{k}" / "model.safetensors" for k in (EVERY, STEPS)]
    assert (weights[0].stat().st_size > weights[1].stat().st_size) == (variant != "base")


def test_the_last_checkpoint_is_gone_on_with_in_bfloat16(tmp_path):
    """A training that stopped; ``resume()`` finds where."""

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            control.should_training_stop = state.global_step == 9

    ends = []
    for stop in ([], [Stop()]):
        folder, model = tmp_path / str(len(ends)), bert()
        run = fit(folder, pruning(model, "sp"), None, *stop, bf16=True).run
        if stop:
            model, callback = bert(), None
            run = pruning(model, "sp")
            callback = DecayPruningCallback(run)
            given = Trainer(
                model, arguments(folder, bf16=True), train_dataset=DATA, callbacks=[callback]
            )
            assert callback.resume(folder) == str(folder / "checkpoint-8")
            given.train(resume_from_checkpoint=True)
        ends.append(model)
    assert_same(*ends)


def vit() -> ViTForImageClassification:
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=4,
        patch_size=2,
        num_channels=1,
        num_labels=3,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
    )
    return ViTForImageClassification(config)


def test_a_model_that_is_saved_by_other_names(tmp_path):
    """Transformers saves some by names of earlier releases, by which its Trainer does not load."""
    images = torch.randn(32, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    example = {"pixel_values": images[:2]}
    data = [{"pixel_values": image, "labels": k % 3} for k, image in enumerate(images)]
    ends = []
    for path in (None, tmp_path / "checkpoint-4", tmp_path / "checkpoint-8"):
        model = vit()
        options = DepGraphOptions(ratio=0.5, skip_unsupported=True, global_pruning=False)
        callback = DecayPruningCallback(DepGraph(model, example, options, SmoothPruning(6)))
        best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": EVERY}
        settings = arguments(tmp_path if path is None else tmp_path / "resumed", **best)
        given = Trainer(model, settings, train_dataset=data, eval_dataset=data[:8])
        given.add_callback(callback)
        given.train(resume_from_checkpoint=callback.resume(path) if path else None)
        assert callback.run.removed
        assert "save_pretrained" not in vars(model)
        ends.append(model)
    for other in ends[1:]:
        assert_same(other, ends[0])


class WithLoss(nn.Module):
    """A network as the Trainer takes one."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": functional.cross_entropy(self.net(images[0]), labels[0])}


@pytest.mark.parametrize("name", ["otov2", "gate-decorator", "torch-prune"])
def test_every_framework_does_in_a_trainer_what_it_does_in_a_loop(tmp_path, name):
    [case] = [c for c in CASES if c.name == name]
    drive = Drive(case, case.adapter(case.build(), "sr")).run()
    model = WithLoss(case.build())
    run = case.adapter(model.net, "sr")
    optimizer = case.new_optimizer(run)
    data = [dict(zip(("images", "labels"), batch(k), strict=True)) for k in range(drive.steps)]
    settings = arguments(
        tmp_path,
        max_steps=drive.steps,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=1,
        max_grad_norm=0,
        save_strategy="no",
        train_sampling_strategy="sequential",
    )
    constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1)
    given = Trainer(
        model,
        settings,
        train_dataset=data,
        callbacks=[DecayPruningCallback(run)],
        optimizers=(optimizer, constant),
    )
    given.train()
    assert run.removed == drive.adapter.removed
    assert_same(model.net, drive.model)


def test_a_hearings_batches_come_from_the_user(tmp_path):
    model = bert()
    criterion = SelfRectifying(Hearing(batches=2), max_share=0.4)
    run = pruning(model, "sr", criterion)
    labels = torch.tensor([0, 1])
    callback = DecayPruningCallback(run, lambda: model(**EXAMPLE, labels=labels).loss)
    settings = arguments(tmp_path, save_strategy="no")
    Trainer(model, settings, train_dataset=DATA, callbacks=[callback]).train()
    assert run.heard
    assert run.removed


def test_the_best_model_is_a_small_one(tmp_path):
    """By a metric that the dense model is best in: it falls with the steps."""

    class Falling(TrainerCallback):
        def on_evaluate(
            self, args: Any, state: Any, control: Any, metrics: dict[str, float], **others: Any
        ) -> None:
            metrics["eval_good"] = -float(state.global_step)

    model = bert()
    best = {
        "load_best_model_at_end": True,
        "metric_for_best_model": "good",
        "greater_is_better": True,
        "eval_strategy": "steps",
        "eval_steps": EVERY,
        "save_total_limit": 2,
    }
    fit(tmp_path, pruning(model, "sp"), None, Falling(), **best)
    state = json.loads((tmp_path / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    assert state["best_global_step"] == 8
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-16", "checkpoint-8"]
    other = bert()
    callback = DecayPruningCallback(pruning(other, "sp"))
    callback.resume(tmp_path / "checkpoint-8")
    other.load_state_dict(
        transformers.modeling_utils.load_state_dict(tmp_path / "checkpoint-8/model.safetensors")
    )
    assert_same(other, model)


@pytest.mark.parametrize(
    "kind", [BertForSequenceClassification, AutoModelForSequenceClassification]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_small_model_is_saved_and_reloaded(tmp_path, kind, dtype):
    model = bert()
    run = pruning(model, "base")
    run.attach(torch.optim.SGD(model.parameters(), 0.1))
    removal = run.remove()
    save_pruned_pretrained(tmp_path, model.to(dtype), removal)
    small = load_pruned_pretrained(kind, tmp_path, EXAMPLE)
    assert type(small) is BertForSequenceClassification
    assert not small.training
    assert_same(small, model)
    assert small.get_submodule(UNITS).weight.dtype == dtype


def test_a_folder_of_another_model_is_refused(tmp_path):
    model = bert()
    run = pruning(model, "base")
    run.attach(torch.optim.SGD(model.parameters(), 0.1))
    save_pruned_pretrained(tmp_path, model, run.remove())
    model.config.intermediate_size = 10
    model.config.save_pretrained(tmp_path)
    with pytest.raises(MismatchError, match="same settings"):
        load_pruned_pretrained(BertForSequenceClassification, tmp_path, EXAMPLE)


# ---------------------------------------------------------------------- what is refused


def given(folder: Path, **settings: Any) -> tuple[Trainer, DecayPruningCallback]:
    model = bert()
    callback = DecayPruningCallback(pruning(model, "sp"))
    return Trainer(
        model, arguments(folder, **settings), train_dataset=DATA, callbacks=[callback]
    ), callback


def test_resuming_takes_both_calls(tmp_path):
    with pytest.warns(UnfinishedWarning, match="structures still decay"):
        fit(tmp_path, pruning(bert(), "sp"), max_steps=EVERY)
    dense = str(tmp_path / f"checkpoint-{EVERY}")
    with pytest.raises(AdapterError, match=r"takes both: .*callback\.resume"):
        given(tmp_path)[0].train(resume_from_checkpoint=dense)
    trainer, callback = given(tmp_path)
    callback.resume(dense)
    with pytest.raises(AdapterError, match="takes both"):
        trainer.train()


def test_a_checkpoint_without_a_state_is_refused(tmp_path):
    fit(tmp_path, pruning(bert(), "sp"), max_steps=EVERY)
    state = tmp_path / f"checkpoint-{EVERY}" / STATE
    whole = state.read_bytes()
    for content in (None, b"", whole[:100], whole[: len(whole) // 2], b"no such file"):
        state.unlink(missing_ok=True)
        if content is not None:
            state.write_bytes(content)
        trainer, callback = given(tmp_path)
        with pytest.raises(AdapterError, match=r"decay_pruning\.pt cannot be read .* another one"):
            callback.resume(tmp_path)
        assert trainer.model.get_submodule(UNITS).out_features == 24
    for nothing in (tmp_path / "missing", given(tmp_path / "empty")[0].args.output_dir):
        with pytest.raises(AdapterError, match="no complete checkpoint"):
            callback.resume(nothing)


def test_another_model_is_refused(tmp_path):
    callback = DecayPruningCallback(pruning(bert(), "sp"))
    settings = arguments(tmp_path)
    for model in ({"model": bert()}, {"model_init": bert}):
        trainer = Trainer(**model, args=settings, train_dataset=DATA, callbacks=[callback])
        with pytest.raises(AdapterError, match="another model than the trainer's"):
            trainer.train()


@pytest.mark.parametrize(
    "changed",
    [
        {"parallel_mode": ParallelMode.DISTRIBUTED},
        {"fsdp": ["full_shard"]},
        {"deepspeed": "settings.json"},
    ],
)
def test_what_holds_on_to_parameters_is_refused(changed):
    model = bert()
    callback = DecayPruningCallback(pruning(model, "sp"))
    usual = {"parallel_mode": ParallelMode.NOT_PARALLEL, "fsdp": [], "deepspeed": None}
    settings = SimpleNamespace(output_dir="out", **{**usual, **changed})
    with pytest.raises(AdapterError, match="several processes, FSDP and DeepSpeed"):
        callback.on_train_begin(settings, None, None, model, None)


def test_a_model_from_which_nothing_is_removed_yet_is_not_saved_as_pruned(tmp_path):
    with pytest.raises(SavedModelError, match="no removal to save"):
        save_pruned_pretrained(tmp_path / "small", nn.Linear(2, 2), None)
    assert not (tmp_path / "small").exists()
