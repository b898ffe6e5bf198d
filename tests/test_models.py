"""The networks: published sizes, torchvision's AlexNet, names and their errors."""

import pytest
import torch
import torchvision
from torch import Tensor, nn

from dst.models import MODELS, build, describe
from dst.models.wide_resnet import Block
from growth.errors import InputError


def _meta(name: str, *, in_channels: int = 3, image_size: int = 32, classes: int = 10) -> nn.Module:
    """The model without storage, so that large ones cost nothing."""
    with torch.device("meta"):
        return build(name, in_channels=in_channels, image_size=image_size, classes=classes)


def _weights_and_macs(model: nn.Module, image: Tensor) -> tuple[int, int]:
    """Number of conv and linear weights, and multiply-adds they do for one ``image``."""
    macs = 0

    def count(module: nn.Conv2d | nn.Linear, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal macs
        positions = output[0, 0].numel() if isinstance(module, nn.Conv2d) else 1
        macs += module.weight.numel() * positions

    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    for layer in layers:
        layer.register_forward_hook(count)
    model(image)
    return sum(layer.weight.numel() for layer in layers), macs


@pytest.mark.parametrize(
    ("name", "weights", "macs"),
    [
        ("wrn-22-2", 1_076_912, 157.73e6),
        ("wrn-16-8", 10_954_160, 1548.1e6),
        ("wrn-28-10", 36_461_232, 5243.3e6),
    ],
)
def test_wide_resnets_have_the_published_size(name: str, weights: int, macs: float) -> None:
    counted = _weights_and_macs(_meta(name), torch.empty(1, 3, 32, 32, device="meta"))
    assert counted[0] == weights
    assert counted[1] == pytest.approx(macs, rel=5e-5)


def test_wide_resnet_convolves_the_shortcut_only_where_the_shape_changes() -> None:
    def convolved(name: str) -> list[str]:
        modules = _meta(name).named_modules()
        return [n for n, m in modules if isinstance(m, Block) and m.shortcut is not None]

    assert convolved("wrn-16-1") == ["group2.0", "group3.0"]
    assert convolved("wrn-16-2") == ["group1.0", "group2.0", "group3.0"]


@pytest.mark.parametrize(("n_out", "stride"), [(4, 1), (6, 1), (4, 2)])
def test_block_is_preactivation_with_a_shared_first_activation(n_out: int, stride: int) -> None:
    torch.manual_seed(0)
    block = Block(4, n_out, stride, dropout=0.0)
    x = torch.randn(5, 4, 6, 6)
    activated = torch.relu((x - x.mean((0, 2, 3), keepdim=True)) / _deviation(x))
    hidden = nn.functional.conv2d(activated, block.conv1.weight, stride=stride, padding=1)
    hidden = torch.relu((hidden - hidden.mean((0, 2, 3), keepdim=True)) / _deviation(hidden))
    expected = nn.functional.conv2d(hidden, block.conv2.weight, padding=1)
    if block.shortcut is None:
        expected = expected + x
    else:
        expected = expected + nn.functional.conv2d(activated, block.shortcut.weight, stride=stride)
    torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-5)


def _deviation(x: Tensor) -> Tensor:
    """Per channel, as batch normalisation takes it (eps 1e-5)."""
    return (x.var((0, 2, 3), correction=0, keepdim=True) + 1e-5).sqrt()


def test_wide_resnet_initial_convolutions_are_kaiming_fan_out() -> None:
    torch.manual_seed(0)
    model = build("wrn-10-4", in_channels=3, image_size=32, classes=10)
    weight = model.get_parameter("group3.0.conv1.weight")  # (256, 128, 3, 3)
    assert weight.std().item() == pytest.approx((2 / (256 * 9)) ** 0.5, rel=0.02)


def test_alexnet_is_torchvisions() -> None:
    ours = _meta("alexnet", image_size=224, classes=1000).state_dict()
    with torch.device("meta"):
        theirs = torchvision.models.alexnet(weights=None).state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


def test_alexnet_computes_what_torchvisions_does() -> None:
    torch.manual_seed(0)
    ours = build("alexnet", in_channels=3, image_size=63, classes=10).eval()
    theirs = torchvision.models.AlexNet(num_classes=10).eval()
    theirs.load_state_dict(ours.state_dict(), assign=True)
    images = torch.randn(2, 3, 63, 63)
    with torch.no_grad():
        assert torch.equal(ours(images), theirs(images))


def test_small_alexnet_differs_in_the_stem_only_and_fills_the_classifier() -> None:
    small = _meta("alexnet-small", in_channels=1, image_size=28)
    large = _meta("alexnet", image_size=224).state_dict()
    differing = [k for k, v in small.state_dict().items() if v.shape != large[k].shape]
    assert differing == ["features.0.weight"]
    features = small.get_submodule("features")
    assert features(torch.empty(1, 1, 28, 28, device="meta")).shape == (1, 256, 6, 6)


def test_small_alexnet_takes_backward_hooks_on_its_layers() -> None:
    model = build("alexnet-small", in_channels=1, image_size=8, classes=3)
    seen: list[nn.Module] = []

    def record(module: nn.Module, grad_input: object, grad_output: object) -> None:
        seen.append(module)

    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    for layer in layers:
        layer.register_full_backward_hook(record)
    images = torch.randn(2, 1, 8, 8, requires_grad=True)
    model(images).sum().backward()
    assert seen == layers[::-1]


@pytest.mark.parametrize(
    ("name", "channels", "size"),
    [
        ("wrn-16-1", 1, 28),
        ("wrn-10-2", 3, 32),
        ("wrn-10-1", 1, 8),
        ("alexnet", 3, 63),
        ("alexnet", 3, 224),
        ("alexnet-small", 1, 28),
        ("alexnet-small", 3, 32),
        ("alexnet-small", 1, 8),
        ("mlp-7", 3, 32),
        ("mlp-300-100", 1, 28),
    ],
)
def test_images_to_logits(name: str, channels: int, size: int) -> None:
    model = _meta(name, in_channels=channels, image_size=size, classes=7)
    images = torch.empty(2, channels, size, size, device="meta")
    assert model(images).shape == (2, 7)


def test_mlp_layers() -> None:
    model = _meta("mlp-300-100-50", in_channels=1, image_size=28)
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    assert [m.weight.shape for m in linear] == [(300, 784), (100, 300), (50, 100), (10, 50)]
    kinds = [type(m).__name__ for m in model.children()]
    assert kinds == ["Flatten", *["Linear", "ReLU", "Dropout"] * 3, "Linear"]


@pytest.mark.parametrize("name", ["wrn-10-1", "alexnet-small", "mlp-20-20"])
def test_dropout_acts_in_training_only_and_adds_no_state(name: str) -> None:
    torch.manual_seed(0)
    sizes = {"in_channels": 1, "image_size": 8, "classes": 4}
    model, plain = build(name, **sizes, dropout=0.5), build(name, **sizes)
    assert list(model.state_dict()) == list(plain.state_dict())
    for module in (*model.modules(), *plain.modules()):
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.0  # so that training mode alone changes nothing
    images = torch.randn(4, 1, 8, 8)
    with torch.no_grad():
        assert not torch.equal(model(images), model(images))
        assert torch.equal(plain(images), plain(images))
        assert torch.equal(model.eval()(images), model(images))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("wrn-17-1", "depth 17.*6n \\+ 4"),
        ("wrn-4-1", "depth 4.*6n \\+ 4"),
        ("wrn-16-0", "width 0"),
        ("wrn-16-x", "wrn-DEPTH-WIDTH"),
        ("wrn-16", "wrn-DEPTH-WIDTH"),
        ("wrn-16-1-1", "wrn-DEPTH-WIDTH"),
        ("wrn-16--1", "wrn-DEPTH-WIDTH"),
        ("wrn", "wrn-DEPTH-WIDTH"),
        ("mlp", "mlp-W1-W2"),
        ("mlp-", "mlp-W1-W2"),
        ("mlp-0", "hidden widths from 1"),
        ("mlp-300-", "mlp-W1-W2"),
        ("mlp-300-٣", "mlp-W1-W2"),
        ("wnr-16-1", "did you mean wrn-DEPTH-WIDTH"),
        ("WRN-16-1", "did you mean wrn-DEPTH-WIDTH"),
        ("alexnet-smal", "did you mean alexnet-small"),
        ("alexnett", "did you mean alexnet"),
        ("alexnet-small-2", "did you mean alexnet-small"),
        ("", "give one of wrn-DEPTH-WIDTH, alexnet, "),
        ("qqq", "give one of wrn-DEPTH-WIDTH, alexnet, "),
    ],
)
def test_bad_names_are_refused(name: str, said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        _meta(name)
    assert repr(name)[1:-1] in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"name": "alexnet", "image_size": 62}, "62 px: use alexnet-small"),
        ({"name": "alexnet", "image_size": 64, "in_channels": 1}, "1 channels.*alexnet-small"),
        ({"name": "alexnet-small", "image_size": 7}, "at least 8 px, not of 7 px"),
        ({"in_channels": 0}, "in_channels 0"),
        ({"image_size": -1}, "image_size -1"),
        ({"classes": 0}, "classes 0"),
        ({"dropout": 1.0}, "dropout 1.0"),
        ({"dropout": -0.1}, "dropout -0.1"),
        ({"dropout": float("nan")}, "dropout nan"),
    ],
)
def test_bad_numbers_are_refused(change: dict[str, object], said: str) -> None:
    good = {"name": "mlp-3", "in_channels": 3, "image_size": 32, "classes": 10, "dropout": 0.0}
    with pytest.raises(InputError, match=said):
        build(**{**good, **change})  # type: ignore[arg-type]


def test_describe_lists_every_model_in_one_line() -> None:
    assert describe() == "wrn-DEPTH-WIDTH, alexnet, alexnet-small, mlp-W1-W2-..."
    assert all(model.form.startswith(key) for key, model in MODELS.items())
