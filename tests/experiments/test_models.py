"""The networks: their sizes and names are the ones that results in the literature refer to."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dpm_core.adapters.base import count_macs, count_parameters
from experiments.inputs.models import MODELS, build

pytestmark = pytest.mark.usefixtures("one_thread")


def counted_by_hooks(model: nn.Module, example: torch.Tensor) -> int:
    """Multiply-accumulates of convolutions and linear layers for one sample, layer by layer."""
    total = 0

    def convolution(module, inputs, output):
        nonlocal total
        kernel = module.kernel_size[0] * module.kernel_size[1]
        per_position = kernel * module.in_channels // module.groups * module.out_channels
        total += per_position * output.shape[2] * output.shape[3]

    def linear(module, inputs, output):
        nonlocal total
        total += module.in_features * module.out_features

    handles = [
        m.register_forward_hook(convolution if isinstance(m, nn.Conv2d) else linear)
        for m in model.modules()
        if isinstance(m, (nn.Conv2d, nn.Linear))
    ]
    with torch.no_grad():
        model.eval()(example[:1])
    for handle in handles:
        handle.remove()
    return total


def vgg_parameters(widths, channels, classes):
    total = 0
    for width in widths:
        total += 9 * channels * width + width + 2 * width  # weight, bias, BatchNorm
        channels = width
    return total + channels * classes + classes


def resnet_parameters(blocks, channels, classes):
    total = 9 * channels * 16 + 2 * 16
    inside = 16
    for width in (16, 32, 64):
        for block in range(blocks):
            total += 9 * inside * width + 2 * width + 9 * width * width + 2 * width
            if block == 0 and inside != width:
                total += inside * width + 2 * width
            inside = width
    return total + 64 * classes + classes


VGG16 = [64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]


@pytest.mark.parametrize(
    ("name", "expected", "by_hand"),
    [
        ("vgg16-bn", 14_728_266, vgg_parameters(VGG16, 3, 10)),
        ("vgg16-quarter", 924_186, vgg_parameters([w // 4 for w in VGG16], 3, 10)),
        ("resnet20", 272_474, resnet_parameters(3, 3, 10)),
        ("resnet56", 855_770, resnet_parameters(9, 3, 10)),
    ],
)
def test_networks_have_the_parameters_of_the_literature(name, expected, by_hand):
    assert count_parameters(build(name, 3, 10)) == expected == by_hand


def test_the_network_for_digits_is_small():
    widths = [32, 32, 64, 64, 128, 128]
    assert count_parameters(build("vgg-digits", 1, 10)) == vgg_parameters(widths, 1, 10) == 288_618


@pytest.mark.parametrize(
    ("name", "size", "expected"),
    [
        ("vgg16-bn", 32, 313_201_664),
        ("vgg16-quarter", 32, 19_907_840),
        ("resnet20", 32, 40_813_184),
        ("resnet56", 32, 125_747_840),
    ],
)
def test_macs_are_those_of_all_convolutions_and_linear_layers(name, size, expected):
    model, example = build(name, 3, 10), torch.zeros(2, 3, size, size)
    assert count_macs(model, example) == counted_by_hooks(model, example) == expected


def test_macs_are_counted_in_eval_mode_and_leave_modes_and_statistics_alone():
    model = build("resnet20", 3, 10).train()
    model.bn1.eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    count_macs(model, torch.randn(2, 3, 32, 32))
    assert not model.bn1.training
    assert model.layer1[0].bn1.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("channels", "classes"), [(3, 10), (1, 7)])
def test_networks_give_one_logit_per_class(name, channels, classes):
    model = build(name, channels, classes).eval()
    with torch.no_grad():
        logits = model(torch.randn(2, channels, 32, 32))
    assert logits.shape == (2, classes)
    assert logits.dtype == torch.float32
    assert logits.isfinite().all()


@pytest.mark.parametrize("name", ["vgg-digits", "resnet20"])
def test_small_networks_take_digits(name):
    assert build(name, 1, 10)(torch.randn(2, 1, 8, 8)).shape == (2, 10)


def test_resnet56_has_the_layer_names_of_the_literature():
    names = dict(build("resnet56", 3, 10).named_modules())
    wanted = ["conv1", "bn1", "layer1.0.conv1", "layer1.8.bn2", "layer2.0.shortcut.0"]
    wanted += ["layer3.0.shortcut.1", "layer3.8.conv2", "linear"]
    assert [n for n in wanted if n not in names] == []
    assert "layer1.9" not in names
    assert "layer1.0.shortcut.0" not in names
    convolutions = [n for n, m in names.items() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 55 + 2
    assert names["layer2.0.shortcut.0"].kernel_size == (1, 1)
    assert names["layer2.0.shortcut.0"].stride == (2, 2)


def test_vgg16_has_13_convolutions_with_bias_and_one_linear_layer():
    modules = list(build("vgg16-bn", 3, 10).modules())
    convolutions = [m for m in modules if isinstance(m, nn.Conv2d)]
    assert [m.out_channels for m in convolutions] == VGG16
    assert all(m.bias is not None for m in convolutions)
    assert sum(isinstance(m, nn.BatchNorm2d) for m in modules) == 13
    assert sum(isinstance(m, nn.Linear) for m in modules) == 1


@pytest.mark.parametrize("name", MODELS)
def test_a_seed_fixes_the_initial_weights(name):
    first, again, other = (build(name, 1, 10, seed=s).state_dict() for s in (3, 3, 4))
    assert all(torch.equal(v, again[k]) for k, v in first.items())
    assert any(not torch.equal(v, other[k]) for k, v in first.items())


def test_building_leaves_the_global_random_state_alone():
    state = torch.get_rng_state()
    build("vgg-digits", 1, 10, seed=3)
    build("vgg-digits", 1, 10)
    assert torch.equal(torch.get_rng_state(), state)


def test_convolutions_start_with_he_weights_and_zero_bias():
    model = build("vgg16-bn", 3, 10, seed=0)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            expected = (2 / (9 * module.out_channels)) ** 0.5
            assert abs(float(module.weight.detach().std()) / expected - 1) < 0.05
            assert not module.bias.any()
