"""The networks: published shapes, torchvision's and timm's models, sparse steps, names and errors.

The published sizes stand in test_golden_erk.py.
"""

import sys

import pytest
import torch
import torchvision
from torch import Tensor, nn

import dst
from dst.models import MODELS, build, check_name, describe
from dst.models.wide_resnet import Block
from growth.errors import InputError


def _meta(name: str, *, in_channels: int = 3, image_size: int = 32, classes: int = 10) -> nn.Module:
    """The model without storage, so that large ones cost nothing."""
    with torch.device("meta"):
        return build(name, in_channels=in_channels, image_size=image_size, classes=classes)


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
        ("alexnet-narrow", 1, 28),
        ("resnet18", 3, 64),
        ("resnet50", 1, 224),
        ("resnet18-small", 1, 28),
        ("resnet50-small", 3, 8),
        ("vit-b-16", 3, 224),
        ("vit-b-16", 1, 32),
        ("vit-small", 1, 28),
        ("vit-small", 3, 32),
        ("vit-narrow", 1, 28),
        ("mlp-group", 1, 28),
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


@pytest.mark.parametrize(
    ("name", "widths"),
    [("mlp-group", [784, 128, 128, 256, 256, 512, 512, 10]), ("mlp-ticket", [784, 300, 100, 10])],
)
def test_perceptrons_of_the_papers(name: str, widths: list[int]) -> None:
    model = _meta(name, in_channels=1, image_size=28)
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    assert [linear[0].in_features, *(m.out_features for m in linear)] == widths
    assert not any(isinstance(m, nn.Conv2d) for m in model.modules())


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "vit_b_16"])
def test_torchvisions_networks_are_taken_as_they_are(name: str) -> None:
    ours = _meta(name.replace("_", "-"), image_size=224, classes=1000).state_dict()
    with torch.device("meta"):
        theirs = getattr(torchvision.models, name)(weights=None).state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    grey = _meta(name.replace("_", "-"), image_size=224, classes=1000, in_channels=1).state_dict()
    differing = {k for k, v in grey.items() if v.shape != theirs[k].shape}
    assert differing == {"conv_proj.weight" if name.startswith("vit") else "conv1.weight"}


def test_small_resnets_differ_in_the_stem_only_and_keep_4_x_4_positions() -> None:
    small, large = _meta("resnet18-small"), _meta("resnet18", image_size=64).state_dict()
    differing = [k for k, v in small.state_dict().items() if v.shape != large[k].shape]
    assert differing == ["conv1.weight"]
    seen: list[torch.Size] = []
    small.get_submodule("layer4").register_forward_hook(lambda m, x, y: seen.append(y.shape))
    small(torch.empty(1, 3, 32, 32, device="meta"))
    assert seen == [(1, 512, 4, 4)]


@pytest.mark.parametrize(
    ("name", "stem", "variance"),
    [
        ("resnet18", "conv1.weight", 2 / (64 * 49)),
        ("resnet18-small", "conv1.weight", 2 / (64 * 9)),
        ("vit-small", "conv_proj.weight", 1 / 16),
    ],
)
def test_replaced_stems_are_initialised_as_torchvision_does(
    name: str, stem: str, variance: float
) -> None:
    torch.manual_seed(0)
    weight = build(name, in_channels=1, image_size=64, classes=2).get_parameter(stem)
    assert weight.var().item() == pytest.approx(variance, rel=0.1)


def test_small_vit() -> None:
    model = _meta("vit-small", in_channels=1, image_size=28)
    rows = {row.name: row.shape for row in dst.density_table(model)}
    assert len(rows) == 1 + 6 * 4 + 1
    assert rows["encoder.layers.encoder_layer_0.self_attention.in_proj"] == (576, 192)
    assert rows["encoder.layers.encoder_layer_5.mlp.0"] == (768, 192)
    assert model.get_parameter("encoder.pos_embedding").shape == (1, 49 + 1, 192)


# timm's smallest: a plain one, and one whose attention has a joint projection.
TIMM = ("timm:test_resnet", "timm:test_vit")


@pytest.mark.parametrize("name", TIMM)
@pytest.mark.parametrize(("channels", "size"), [(1, 32), (3, 64)])
def test_timms_models_take_our_images(name: str, channels: int, size: int) -> None:
    pytest.importorskip("timm")
    model = _meta(name, in_channels=channels, image_size=size, classes=7)
    assert model.training
    assert model(torch.empty(2, channels, size, size, device="meta")).shape == (2, 7)


def test_every_head_of_timms_attention_is_sparse_by_itself() -> None:
    pytest.importorskip("timm")
    model = build("timm:test_vit", in_channels=1, image_size=32, classes=7)
    dst.sparsify(model, density=0.2, skip=())
    layer = dst.sparse_layers(model)["blocks.0.attn.qkv"]
    heads = model.get_submodule("blocks.0.attn").num_heads
    assert layer.row_groups == 3 * heads
    rows = layer.topology.grid.n_rows // layer.row_groups
    assert torch.bincount(layer.topology.rows() // rows).unique().numel() == 1


@pytest.mark.parametrize(
    ("name", "size", "said"),
    [
        ("timm:resnett18", 32, "timm has no model 'resnett18': did you mean resnet18"),
        ("timm:", 32, "timm has no model '': see timm.list_models"),
        ("timm:resnet18.a1_in1k", 32, "did you mean resnet18"),
        ("timm:test_vit", 0, "image_size 0"),
        ("timm:vgg11", 4, "vgg11 does not take images of 3 channels and 4 px .*image-size"),
    ],
)
def test_timms_models_that_cannot_be(name: str, size: int, said: str) -> None:
    pytest.importorskip("timm")
    with pytest.raises(InputError, match=said) as caught:
        _meta(name, image_size=size)
    assert "\n" not in str(caught.value)


def test_timm_is_needed_for_its_models_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    assert check_name("timm:anything") == "timm"
    with pytest.raises(InputError, match=r"'timm:resnet18' needs .* pip install 'sparsegrow\[timm"):
        _meta("timm:resnet18")


@pytest.mark.parametrize(
    ("name", "channels", "size"),
    [
        ("resnet18-small", 1, 8),
        ("vit-small", 1, 8),
        ("mlp-group", 1, 8),
        ("mlp-ticket", 1, 8),
        *((name, 3, 32) for name in TIMM),
    ],
)
def test_sparse_steps(name: str, channels: int, size: int) -> None:
    """An update that grows in every layer by gradient, and a step with what was grown."""
    if name.startswith("timm"):
        pytest.importorskip("timm")
    torch.manual_seed(0)
    model = build(name, in_channels=channels, image_size=size, classes=5)
    dst.sparsify(model, density=0.1, distribution="erk")
    assert dst.model_density(model) == pytest.approx(0.1, rel=0.02)
    layers = dst.sparse_layers(model)
    before = {n: layer.topology.keys() for n, layer in layers.items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    schedule = dst.UpdateSchedule(2, 100, 0.3, "constant")
    updater = dst.TopologyUpdater(model, optimizer, dst.rigl(schedule))
    images, labels = torch.randn(4, channels, size, size), torch.arange(4)
    for step in range(3):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        assert updater.step() == (step == 1)
        if step != 1:
            optimizer.step()
    assert bool(loss.isfinite())
    for n, layer in layers.items():
        assert layer.topology.alive == before[n].numel()
        assert not torch.equal(layer.topology.keys(), before[n]), n


@pytest.mark.parametrize(
    "name", ["wrn-10-1", "alexnet-small", "mlp-20-20", "resnet18-small", "vit-small"]
)
def test_dropout_acts_in_training_only_and_adds_no_state(name: str) -> None:
    torch.manual_seed(0)
    sizes = {"in_channels": 1, "image_size": 8, "classes": 4}
    model, plain = build(name, **sizes, dropout=0.5), build(name, **sizes)
    assert list(model.state_dict()) == list(plain.state_dict())
    for module in (*model.modules(), *plain.modules()):
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.0  # so that training mode alone changes nothing
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight)  # a ViT's head starts at zero
    plain.load_state_dict(model.state_dict())
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
        ("resnet18-2", "did you mean resnet18"),
        ("resnet101", "did you mean resnet"),
        ("vit-b-32", "did you mean vit-b-16"),
        ("mlp-groups", "mlp-W1-W2"),
        ("tim:efficientnet", "did you mean timm:NAME"),
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
        ({"name": "resnet50", "image_size": 63}, "at least 64 px.*resnet50-small"),
        ({"name": "vit-b-16", "image_size": 28}, "28 px are no multiple of: use --image-size"),
        ({"name": "vit-small", "image_size": 30}, "30 px are no multiple of: use --image-size"),
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
    assert describe() == (
        "wrn-DEPTH-WIDTH, alexnet, alexnet-small, alexnet-narrow, resnet18, resnet50, "
        "resnet18-small, resnet50-small, vit-b-16, vit-small, vit-narrow, mlp-group, mlp-ticket, "
        "mlp-W1-W2-..., timm:NAME"
    )
    assert all(model.form.startswith(key) for key, model in MODELS.items())
    assert all(check_name(key) == key for key in MODELS)
