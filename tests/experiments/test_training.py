"""The parts of the training loop: learning rates, accuracy, re-estimated statistics, modes."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from experiments.config import Compute, Curve, Stage
from experiments.inputs import models
from experiments.inputs.images import Images, mixing
from experiments.running import training
from experiments.running.ranks import Ranks
from experiments.running.speed import latency
from experiments.running.training import (
    EVALUATION_BATCH,
    DivergedError,
    Loop,
    accuracy,
    evaluating,
    fastest_layout,
    laid_out,
    learning_rate,
    outputs,
    reestimated,
)
from tests.support import rounding
from tests.support.rounding import in_double

pytestmark = pytest.mark.usefixtures("one_thread")


def images(train: int = 60, test: int = 60) -> Images:
    draw = torch.Generator().manual_seed(1)
    pixels = torch.randint(256, (train + test, 1, 8, 8), generator=draw, dtype=torch.uint8)
    labels = torch.randint(10, (train + test,), generator=draw)
    return Images(
        "noise", pixels[:train], labels[:train], pixels[train:], labels[train:], 10, 1, False
    )


def colours() -> Images:
    part = images()
    return replace(part, train=part.train.repeat(1, 3, 1, 1), test=part.test.repeat(1, 3, 1, 1))


def network(seed: int = 0) -> nn.Module:
    """Small, in training mode, with BatchNorm statistics that are not the initial ones."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = models.VGG((8, 0, 12), 1, 10)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.running_mean)
                nn.init.uniform_(module.running_var, 0.5, 2)
                nn.init.uniform_(module.weight, 0.5, 2)
    return model.train()


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(v, right[k]) for k, v in left.items())


# ---------------------------------------------------------------------- learning rate


@pytest.mark.parametrize(
    ("milestones", "expected"),
    [
        ((), [1.0] * 6),
        ((2, 4), [1.0, 1.0, 0.5, 0.5, 0.25, 0.25]),
        ((4, 2), [1.0, 1.0, 0.5, 0.5, 0.25, 0.25]),
        ((0,), [0.5] * 6),
        ((2, 2), [1.0, 1.0, 0.25, 0.25, 0.25, 0.25]),
        ((9,), [1.0] * 6),
    ],
)
def test_the_learning_rate_falls_at_its_milestones(milestones, expected):
    stage = Stage(epochs=6, learning_rate=1.0, milestones=milestones, gamma=0.5)
    assert [learning_rate(stage, epoch) for epoch in range(6)] == expected


def test_the_learning_rate_is_a_function_of_the_epoch_alone():
    stage = Stage(epochs=4, learning_rate=0.1, milestones=(1, 3))
    forwards = [learning_rate(stage, epoch) for epoch in range(4)]
    assert [learning_rate(stage, epoch) for epoch in (3, 2, 1, 0)] == forwards[::-1]
    assert forwards == pytest.approx([0.1, 0.01, 0.01, 0.001])


@pytest.mark.parametrize(
    ("name", "kind", "momentum"),
    [
        ("sgd", torch.optim.SGD, 0.8),
        ("adam", torch.optim.Adam, None),
        ("adamw", torch.optim.AdamW, None),
    ],
)
def test_an_optimizer_is_the_stages_own(name, kind, momentum):
    stage = Stage(epochs=2, optimizer=name, learning_rate=0.3, momentum=0.8, weight_decay=0.01)
    own = loop(images(), stage)
    model, optimizer = own.model, own.new_optimizer()
    (group,) = optimizer.param_groups
    assert type(optimizer) is kind
    assert (group["lr"], group["weight_decay"], group.get("momentum")) == (0.3, 0.01, momentum)
    assert {id(p) for p in group["params"]} == {id(p) for p in model.parameters()}


# ---------------------------------------------------------------------- mixup


def loop(data: Images, stage: Stage, model: nn.Module | None = None) -> Loop:
    """The loop of a dense model: it has no adapter, and is never asked to stop."""
    return Loop(
        model=network() if model is None else model,
        images=data,
        seed=3,
        stages=[("dense", stage)],
        adapter=None,
        curve=Curve(),
        save=lambda _: None,
        stop=lambda: False,
    )


@pytest.mark.parametrize("step", [0, 5])
def test_the_mixed_loss_is_that_of_mixed_images_and_mixed_labels(step):
    data, stage = images(), Stage(epochs=3, batch=20, learning_rate=0.1, mixup=0.7)
    dense = loop(data, stage)
    dense.progress.step = step
    loss = dense.next_loss()
    assert (dense.progress.step, dense.progress.total) == (step + 1, 1)

    # mixup, equation 1: the targets are mixed as the images are, one by one.
    batch, labels = data.batch(20, step, 3000)
    share, partners = mixing(0.7, 20, step, 3000)
    assert 0.02 < share < 0.98, "too close to no mixing to tell"
    targets = torch.zeros(20, 10)
    mixed = torch.empty_like(batch)
    for i, j in enumerate(partners.tolist()):
        mixed[i] = share * batch[i] + (1 - share) * batch[j]
        targets[i, labels[i]] += share
        targets[i, labels[j]] += 1 - share
    expected, exact = (
        -(targets * model(mixed).log_softmax(1)).sum(1).mean()
        for model in (network(), in_double(network()))
    )
    rounding.assert_rounded(loss, expected, exact)


def test_without_mixup_the_loss_is_that_of_the_batch():
    data, stage = images(), Stage(epochs=3, batch=20, learning_rate=0.1)
    batch, labels = data.batch(20, 0, 3000)
    expected = nn.functional.cross_entropy(network()(batch), labels)
    assert torch.equal(loop(data, stage).next_loss(), expected)


# ---------------------------------------------------------------------- accuracy


@pytest.mark.parametrize("n", [1, 60, EVALUATION_BATCH, EVALUATION_BATCH + 1, 1234])
def test_accuracy_is_the_share_of_images_classified_right(n):
    data, model = images(test=n), in_double(network())
    right = 0
    with torch.no_grad():
        logits = model.eval()(data.normalize(data.test)).tolist()
    for row, label in zip(logits, data.test_labels.tolist(), strict=True):
        right += row.index(max(row)) == label
    assert accuracy(model.train(), data) == 100 * right / n
    assert right > 0 or n == 1


def test_accuracy_runs_from_0_to_100():
    data = images()

    class Constant(nn.Module):
        def __init__(self, label):
            super().__init__()
            self.label = label

        def forward(self, x):
            return nn.functional.one_hot(torch.full((len(x),), self.label), 10).float()

    data.test_labels[:] = 3
    assert accuracy(Constant(3), data) == 100.0
    assert accuracy(Constant(4), data) == 0.0


def test_measuring_leaves_the_model_as_it_was():
    data, model = images(), network()
    before = state(model)
    accuracy(model, data)
    outputs(model, data.normalize(data.test[:4]))
    assert same(before, state(model))
    assert all(m.training for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_outputs_are_those_of_eval_mode():
    data, model = images(), network()
    probe = data.normalize(data.test[:4])
    logits = outputs(model, probe)
    assert not logits.requires_grad
    assert torch.equal(logits, model.eval()(probe))


# ---------------------------------------------------------------------- statistics and modes


@pytest.mark.parametrize("train", [60, EVALUATION_BATCH * 2 + 30])
def test_reestimated_statistics_are_the_means_over_training_batches(train):
    data, model = images(train=train), in_double(network())
    # What each BatchNorm reads in training mode, batch by batch.
    seen: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    twin = in_double(network())
    for name, module in twin.named_modules():
        if isinstance(module, nn.BatchNorm2d):

            def note(_module, inputs, name=name):
                x = inputs[0].detach()
                seen.setdefault(name, []).append((x.mean((0, 2, 3)), x.var((0, 2, 3))))

            module.register_forward_pre_hook(note)
    with torch.no_grad():
        for chunk in data.train.split(EVALUATION_BATCH):
            twin(data.normalize(chunk))

    fresh = reestimated(model, data)
    assert len(seen) == 2
    for name, moments in seen.items():
        module = fresh.get_submodule(name)
        assert len(moments) == -(-train // EVALUATION_BATCH)
        for statistic, expected in (
            (module.running_mean, torch.stack([m for m, _ in moments]).mean(0)),
            (module.running_var, torch.stack([v for _, v in moments]).mean(0)),
        ):
            rounding.assert_exact(statistic, expected, name)


def test_reestimation_reads_no_more_batches_than_are_given():
    data, model = images(train=EVALUATION_BATCH + 40), network()
    data.train[EVALUATION_BATCH:] = 255
    head = images(train=EVALUATION_BATCH)
    head.train[:] = data.train[:EVALUATION_BATCH]
    object.__setattr__(head, "_cached_moments", data._moments())
    fresh, expected = reestimated(model, data, batches=1), reestimated(model, head)
    assert same(state(fresh), state(expected))


def test_reestimation_leaves_the_model_alone():
    data, model = images(), network()
    model.features[1].eval()
    before, random = state(model), torch.get_rng_state()
    fresh = reestimated(model, data)
    assert same(before, state(model))
    assert torch.equal(random, torch.get_rng_state())
    assert not model.features[1].training
    assert model.training
    mine = {id(p) for p in itertools.chain(model.parameters(), model.buffers())}
    assert not mine & {id(p) for p in itertools.chain(fresh.parameters(), fresh.buffers())}
    for (name, p), (_, q) in zip(model.named_parameters(), fresh.named_parameters(), strict=True):
        assert torch.equal(p, q), name


@pytest.mark.parametrize("fails", [False, True], ids=["quietly", "after an error"])
def test_evaluating_gives_every_module_its_own_mode_back(fails):
    model = network()
    model.features[1].eval()
    model.features[4].eval()
    before = [m.training for m in model.modules()]
    assert True in before
    assert False in before
    try:
        with evaluating(model):
            assert not any(m.training for m in model.modules())
            if fails:
                raise RuntimeError
    except RuntimeError:
        assert fails
    assert [m.training for m in model.modules()] == before


# ---------------------------------------------------------------------- how the arithmetic is done


def trained(compute: Compute, model: nn.Module | None = None) -> nn.Module:
    loop = Loop(
        model=laid_out(model or network()),
        images=images(),
        seed=0,
        stages=[("dense", Stage(epochs=2, batch=20, learning_rate=0.05))],
        adapter=None,
        curve=Curve(),
        save=lambda loop: None,
        stop=lambda: False,
        compute=compute,
    )
    loop.run()
    assert 0 < loop.seconds_loading < loop.seconds_training
    return loop.model


def distance(left: nn.Module, right: nn.Module) -> float:
    pairs = zip(left.parameters(), right.parameters(), strict=True)
    return max(float((a - b).detach().abs().max()) for a, b in pairs)


def test_bfloat16_trains_float32_parameters_to_nearly_the_same_values():
    plain, half = trained(Compute()), trained(Compute(precision="bfloat16"))
    assert {p.dtype for p in half.parameters()} == {torch.float32}
    # Rounding is measured: that of the first parameters alone, in a training without any other.
    rounded = trained(Compute(), network().bfloat16().float())
    assert 0 < distance(plain, half) < rounding.TIMES * distance(plain, rounded)


def test_compiled_steps_train_as_plain_ones(monkeypatch):
    # The compiler's own code generation is left out: it takes a minute.
    asked = []

    plain = torch.compile

    def eager(model):
        asked.append(model)
        return plain(model, backend="aot_eager")

    monkeypatch.setattr(torch, "compile", eager)
    compiled, expected = (
        trained(compute, in_double(network())) for compute in (Compute(compile=True), Compute())
    )
    for p, q in zip(compiled.parameters(), expected.parameters(), strict=True):
        rounding.assert_exact(p, q)
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("widths", "layout"),
    [((8, 0, 16), torch.channels_last), ((8, 0, 12), torch.contiguous_format)],
)
def test_kernels_are_channels_last_while_all_widths_are_multiples_of_eight(widths, layout):
    model = laid_out(models.VGG(widths, 3, 10))
    before = state(model)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            assert module.weight.is_contiguous(memory_format=layout)
    assert same(before, state(laid_out(model)))


@pytest.mark.parametrize(
    ("widths", "layout"),
    [((8, 0, 16), torch.channels_last), ((8, 0, 12), torch.contiguous_format)],
)
def test_training_images_have_the_layout_that_convolves_fastest(widths, layout):
    """Whatever the kernels' is: in OTOv2 they have to stay contiguous."""
    model, given = models.VGG(widths, 3, 10), []
    training = loop(colours(), Stage(epochs=1, batch=20, learning_rate=0.05), model)
    model.features[0].register_forward_pre_hook(
        lambda _, inputs: given.append(inputs[0].is_contiguous(memory_format=layout))
    )
    training.next_loss()
    assert given == [True]


class Viewing(nn.Module):
    """Calls ``view()``, which takes contiguous tensors alone, of what ``of`` names."""

    def __init__(self, of: str) -> None:
        super().__init__()
        self.of, self.conv, self.norm = of, nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.head = nn.Linear((3 if of == "images" else 8) * 64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        maps = self.norm(self.conv(x))
        if self.of in ("maps", "maps in training" if self.training else "maps in use"):
            maps = maps.view(len(x), -1)
        elif self.of == "images":
            maps = maps.mean() + x.view(len(x), -1)
        y: torch.Tensor = self.head(maps.flatten(1))
        return y


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels_free", "kernels_contiguous"])
@pytest.mark.parametrize("of", ["images", "maps", "maps in training", "maps in use", "none"])
def test_a_network_runs_in_the_layout_that_it_is_given(of, kernels):
    model = Viewing(of).train()
    before = state(model)
    drawn = torch.get_rng_state()
    held = SimpleNamespace(channels_last=kernels, complete=True)
    training = loop(colours(), Stage(epochs=1, batch=20, learning_rate=0.05), model)
    training.adapter = held
    training.lay_out()
    assert same(before, state(model))
    assert model.training
    assert torch.equal(drawn, torch.get_rng_state())
    last = model.conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert last == (kernels and of == "none")
    training.next_loss().backward()
    assert 0 <= accuracy(model, training.images) <= 100
    assert latency({"dense": model}, training.images.normalize(training.images.test[:1]))


def test_a_network_without_convolutions_stays_contiguous():
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 10))
    assert fastest_layout(model) == torch.contiguous_format


def test_latency_is_measured_in_the_fastest_layout():
    """A dense model from a file is contiguous, a masked one from training channels-last."""
    model = models.VGG((8, 0, 16), 3, 10)
    assert not model.features[0].weight.is_contiguous(memory_format=torch.channels_last)
    latency({"dense": model}, torch.zeros(2, 3, 8, 8))
    assert model.features[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_latency_is_a_positive_time_of_every_model_and_changes_nothing():
    small, large = network(), models.VGG((64, 64, 64), 1, 10)
    before = state(small)
    times = latency({"small": small, "large": large}, torch.zeros(64, 1, 8, 8))
    assert 0 < times["small"] < times["large"]
    assert same(before, state(small))
    assert small.training


# ---------------------------------------------------------------------- NaN and infinity


STEPS = 6
SPOILT = {
    # After which step which tensor gets a bad value; what is noticed, and at which step.
    "a bias": (3, "classifier.bias", "the loss", 4),
    "a statistic": (3, "features.1.running_var", "a weight or statistic", STEPS),
    "a weight that is not used": (3, "unused", "a weight or statistic", STEPS),
    "the last weights": (STEPS, "classifier.weight", "a weight or statistic", STEPS),
}


@pytest.mark.parametrize("where", SPOILT)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_ends_training_with_stage_step_and_remedy(where, value):
    after, name, what, step = SPOILT[where]
    spoilt, saved = loop(images(), Stage(epochs=2, batch=20, learning_rate=0.05)), []
    spoilt.model.register_parameter("unused", nn.Parameter(torch.zeros(3)))

    def spoil() -> bool:
        if spoilt.progress.total == after:
            spoilt.model.state_dict()[name].view(-1)[0] = value
        return False

    spoilt.stop, spoilt.save_every = spoil, 0.0
    spoilt.save = lambda it: saved.append(it.progress.total)
    with pytest.raises(DivergedError) as caught:
        spoilt.run()
    start = f"training diverged: by step {step} of stage 'dense' {what} is NaN or infinite; "
    assert str(caught.value).startswith(start + "lower that stage's learning_rate (0.05)")
    assert saved == list(range(1, 4 if what == "the loss" else STEPS + 1))


def test_finite_weights_of_infinite_outputs_are_no_result():
    spoilt = loop(images(), Stage(epochs=2, batch=20, learning_rate=0.05))

    def spoil() -> bool:
        if spoilt.progress.total == STEPS:
            spoilt.model.state_dict()["classifier.weight"].fill_(3e38)
        return False

    spoilt.stop = spoil
    with pytest.raises(DivergedError, match=f"by step {STEPS} of stage 'dense' an output is"):
        spoilt.run()


def test_where_a_look_waits_for_others_it_is_taken_now_and_then(monkeypatch):
    monkeypatch.setattr(training, "BETWEEN_CHECKS", 4)
    watched, asked = loop(images(), Stage(epochs=4, batch=20, learning_rate=0.05)), []

    class Two(Ranks):
        """As one of two processes, of which the other one's loss is NaN from step 5 on."""

        def share(self, whole):
            return whole

        def averaging(self, model):
            return model

        def any(self, flag):
            asked.append(watched.progress.step)
            return flag or watched.progress.step > 4

    watched.ranks = Two(0, 2)
    with pytest.raises(DivergedError, match="by step 8"):
        watched.run()
    assert asked == [4, 8]
