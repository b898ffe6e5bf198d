"""Sparse layers against the dense layer that holds their weight."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from largest_tensor import LargestTensor
from torch import Tensor, nn

from dst import Change, SparseConv2d, SparseLayer, SparseLinear, sparse_layers
from growth import InputError


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


LAYERS: dict[str, Any] = {
    "linear": lambda: SparseLinear(11, 7, density=0.3, generator=_generator()),
    "linear, blocks": lambda: SparseLinear(
        11, 7, density=0.4, block=(2, 3), generator=_generator()
    ),
    "linear, without bias": lambda: SparseLinear(
        11, 7, bias=False, density=0.3, generator=_generator()
    ),
    "conv": lambda: SparseConv2d(5, 7, 3, density=0.3, generator=_generator()),
    "conv, blocks": lambda: SparseConv2d(
        5, 7, (3, 2), density=0.4, block=(2, 3), generator=_generator()
    ),
}


@pytest.fixture(params=LAYERS)
def layer(request: pytest.FixtureRequest) -> SparseLayer:
    built: SparseLayer = LAYERS[request.param]()
    return built


def _dense_shape(layer: SparseLayer) -> tuple[int, ...]:
    grid = layer.topology.grid
    taps = layer.kernel_size if isinstance(layer, SparseConv2d) else ()
    return (grid.n_out, grid.channels, *taps)


def test_weight_round_trip(layer: SparseLayer) -> None:
    dense = torch.randn(_dense_shape(layer))
    layer.set_weight(dense)
    kept = layer.dense_weight()
    assert kept.shape == dense.shape
    alive = kept != 0
    assert int(alive.sum()) == layer.alive  # no random weight is exactly zero
    assert torch.equal(kept[alive], dense[alive])
    values = layer.values.detach().clone()
    layer.set_weight(kept.detach())
    assert torch.equal(layer.values, values)


def test_weight_stands_where_the_keys_say() -> None:
    linear = SparseLinear(3, 2, keys=torch.tensor([1, 5]))
    linear.set_weight(torch.arange(6.0).view(2, 3) + 1)
    assert linear.dense_weight().tolist() == [[0, 2, 0], [0, 0, 6]]
    # Columns of a convolution run over (kh, kw, C): key 4 of 2 x 2 taps of 2 channels is tap
    # (1, 0), channel 0; key 8 + 3 is output 1, tap (0, 1), channel 1.
    conv = SparseConv2d(2, 2, 2, keys=torch.tensor([4, 11]))
    conv.set_weight(torch.ones(2, 2, 2, 2))
    expected = torch.zeros(2, 2, 2, 2)
    expected[0, 0, 1, 0] = expected[1, 1, 0, 1] = 1
    assert torch.equal(conv.dense_weight(), expected)


def test_counts(layer: SparseLayer) -> None:
    ones = torch.ones(_dense_shape(layer))
    layer.set_weight(ones)
    assert layer.total == ones.numel()
    assert layer.alive == int(layer.dense_weight().sum())
    assert layer.density == layer.alive / layer.total
    assert layer.topology.fan_in().tolist() == layer.dense_weight().flatten(1).sum(1).tolist()


@pytest.mark.parametrize(
    ("kernel", "how"),
    [
        (3, {}),
        (1, {"stride": 2}),
        (3, {"stride": (2, 1), "padding": (0, 2)}),
        ((3, 2), {"padding": 1, "dilation": (2, 1)}),
        (3, {"padding": "valid"}),
        (3, {"padding": "same"}),
        ((2, 4), {"padding": "same"}),
        ((4, 3), {"padding": "same", "dilation": (3, 2)}),
        ((2, 3), {"padding": "same", "bias": False}),
    ],
)
@pytest.mark.parametrize("block", [(1, 1), (2, 3)])
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_conv_equals_torch(kernel: Any, how: dict[str, Any], block: tuple[int, int]) -> None:
    torch.manual_seed(0)
    sparse = SparseConv2d(5, 4, kernel, **how, density=0.5, block=block, generator=_generator())
    dense = nn.Conv2d(5, 4, kernel, **how)
    with torch.no_grad():
        dense.weight.copy_(sparse.dense_weight())
        if dense.bias is not None:
            dense.bias.copy_(sparse.bias)
    for shape in ((2, 5, 8, 9), (5, 8, 9)):
        x = torch.randn(shape)
        torch.testing.assert_close(sparse(x), dense(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("compute", ["dense", "sparse", "auto"])
def test_linear_equals_torch(compute: str) -> None:
    layer = SparseLinear(11, 7, density=0.3, compute=compute, generator=_generator())
    for shape in ((4, 11), (2, 3, 11), (11,)):
        x = torch.randn(shape)
        expected = F.linear(x, layer.dense_weight(), layer.bias)
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


def test_what_a_sparse_layer_cannot_do_is_refused() -> None:
    with pytest.raises(InputError, match="2 groups is not supported"):
        SparseConv2d(4, 4, 3, groups=2)
    with pytest.raises(InputError, match="padding 'same' with stride"):
        SparseConv2d(4, 4, 3, padding="same", stride=2)
    with pytest.raises(InputError, match="padding 'full'"):
        SparseConv2d(4, 4, 3, padding="full")
    with pytest.raises(InputError, match="compute 'fast' is unknown: choose auto, dense, sparse"):
        SparseLinear(4, 4, compute="fast")
    with pytest.raises(InputError, match="rounds to no block"):
        SparseLinear(4, 4, density=0.01)
    for density in (0.0, -0.5, 1.5, float("nan"), float("inf")):
        with pytest.raises(InputError, match=r"must lie in \(0, 1\]"):
            SparseLinear(4, 4, density=density)
    with pytest.raises(InputError, match="alive twice"):
        SparseLinear(4, 4, keys=torch.tensor([1, 1]))


def test_density_one_is_a_dense_layer() -> None:
    layer = SparseLinear(5, 4, density=1.0)
    assert layer.alive == layer.total == 20 and layer.density == 1.0


def test_same_generator_same_layer() -> None:
    torch.manual_seed(1)
    first = LAYERS["conv, blocks"]()
    torch.manual_seed(2)
    state = torch.get_rng_state()
    again = LAYERS["conv, blocks"]()
    assert torch.equal(torch.get_rng_state(), state)
    expected = first.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.state_dict().items())


def test_initial_weights_are_uniform_within_the_alive_fan_in() -> None:
    layer = SparseLinear(400, 300, density=0.1, generator=_generator())
    weight, fan_in = layer.dense_weight().detach(), layer.topology.fan_in()
    bound = fan_in.clamp(min=1).rsqrt()
    assert (weight.abs() <= bound[:, None]).all() and (layer.bias.abs() <= bound).all()
    # U(-1, 1): mean 0, variance 1/3; 12,000 draws.
    scaled = (weight / bound[:, None])[weight != 0]
    assert abs(scaled.mean()) < 0.03 and abs(scaled.var() - 1 / 3) < 0.01
    assert abs((layer.bias / bound).var() - 1 / 3) < 0.06


def test_padding_and_free_slots_stay_zero_in_training() -> None:
    torch.manual_seed(0)
    layer = SparseLinear(11, 7, density=0.5, block=(2, 3), generator=_generator())
    padding = torch.ones(_dense_shape(layer))
    layer_mask = copy.deepcopy(layer)
    layer_mask.set_weight(padding)
    outside = layer_mask.values == 0
    assert outside.any()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        layer(torch.randn(4, 11)).square().sum().backward()
        optimizer.step()
    assert (layer.values[outside] == 0).all()


def test_random_blocks_follow_the_topology() -> None:
    """Only where a block stands, inside its padding, bound by each output's own fan-in."""
    layer = SparseLinear(5, 3, keys=torch.tensor([0, 2, 3]), block=(2, 2), generator=_generator())
    layer.topology.edit(Change(torch.tensor([2]), torch.tensor([], dtype=torch.int64)))
    drawn = layer.random_blocks(torch.arange(3), _generator(1))
    free = layer.topology.free_slots()
    assert free.tolist() == [1] and (drawn[1] == 0).all()
    assert (drawn[0] != 0).all()  # block (0, 0), whole
    assert (drawn[2][0] != 0).all() and (drawn[2][1] == 0).all()  # row 3 is padding
    again = layer.random_blocks(torch.arange(3), _generator(1))
    assert torch.equal(drawn, again) and (drawn.abs() <= 2**-0.5).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_and_conversion(dtype: torch.dtype) -> None:
    layer = SparseLinear(6, 5, density=0.5, dtype=dtype, generator=_generator())
    assert layer.values.dtype == layer.bias.dtype == dtype
    assert layer.topology.cols.dtype == torch.int32
    assert layer(torch.randn(2, 6).to(dtype)).dtype == dtype
    layer.float()
    assert layer.values.dtype == torch.float32 and layer.topology.cols.dtype == torch.int32


def test_no_tensor_of_the_dense_size_is_ever_made() -> None:
    n = 4096
    with LargestTensor() as watch:
        layer = SparseLinear(n, n, density=16 / n, generator=_generator())
        layer(torch.randn(2, n)).sum().backward()
    assert layer.chosen is not None and layer.chosen.way == "sparse" and layer.alive == 16 * n
    assert watch.largest < n * n / 50


def test_deep_copies_are_independent(layer: SparseLayer) -> None:
    other = copy.deepcopy(layer)
    before = layer.topology.keys()
    other.topology.edit(Change(before[:1], before[:0]))
    assert torch.equal(layer.topology.keys(), before)
    assert other.topology.alive == before.numel() - 1


def test_sparse_layers_by_name() -> None:
    model = nn.Sequential(SparseLinear(4, 4, density=0.5), nn.ReLU(), nn.Sequential(
        SparseConv2d(2, 2, 2, density=0.5)))  # fmt: skip
    assert list(sparse_layers(model)) == ["0", "2.0"]


def test_repr_names_the_density(layer: SparseLayer) -> None:
    assert f"density={layer.density:.4g}" in repr(layer)


def test_gradient_reaches_every_alive_weight(layer: SparseLayer) -> None:
    torch.manual_seed(0)
    shape: tuple[int, ...] = (3, 11) if isinstance(layer, SparseLinear) else (3, 5, 6, 6)
    layer(torch.randn(shape)).square().sum().backward()
    ones = copy.deepcopy(layer)
    ones.set_weight(torch.ones(_dense_shape(layer)))
    inside: Tensor = ones.values.detach() != 0
    assert torch.equal(layer.values.grad != 0, inside)


@pytest.mark.parametrize("block", [(1, 1), (2, 3)])
def test_groups_of_rows_start_with_equally_many_blocks(block: tuple[int, int]) -> None:
    layer = SparseLinear(10, 24, density=0.3, block=block, row_groups=4)
    assert layer.row_groups == 4 and "row_groups=4" in repr(layer)
    grid = layer.topology.grid
    per_group = torch.bincount(layer.topology.rows() // (grid.n_rows // 4), minlength=4)
    assert per_group.tolist() == [round(0.3 * grid.size / 4)] * 4
    assert SparseLinear(10, 24).row_groups == 1 == SparseConv2d(3, 4, 3).row_groups


def test_one_group_is_drawn_as_ever() -> None:
    plain, grouped = (
        SparseLinear(9, 8, generator=torch.Generator().manual_seed(3), **options)
        for options in ({}, {"row_groups": 1})
    )
    assert torch.equal(plain.topology.keys(), grouped.topology.keys())
    assert torch.equal(plain.values, grouped.values)


@pytest.mark.parametrize(
    ("groups", "block"), [(0, (1, 1)), (-2, (1, 1)), (5, (1, 1)), (4, (4, 1)), (48, (1, 1))]
)
@pytest.mark.parametrize("keys", [None, torch.tensor([0])])
def test_groups_that_are_not_whole_blocks_are_refused(
    groups: int, block: tuple[int, int], keys: torch.Tensor | None
) -> None:
    with pytest.raises(InputError, match=f"row_groups {groups} must cut 24 outputs"):
        SparseLinear(10, 24, keys=keys, block=block, row_groups=groups)
