"""sparsify and densify: densities, what is kept, what is refused."""

import copy
import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dst import (
    SparseConv2d,
    SparseLayer,
    SparseLinear,
    densify,
    density_table,
    model_density,
    sparse_layers,
    sparsify,
)
from dst.distributions import DISTRIBUTIONS, erdos_renyi, erdos_renyi_kernel, uniform
from growth import Grid, InputError


def _mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 40), nn.Linear(40, 10))


def _cnn() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 6, (3, 2), stride=2, padding=(1, 0), dilation=(1, 2)),
        nn.Conv2d(6, 6, (2, 4), padding="same"),
        nn.Flatten(),
        nn.Linear(6 * 4 * 3, 5),
    )


# Distributions.


def test_er_by_hand() -> None:
    """raw: a (10 + 20) / 200 = 0.15, b (10 + 5) / 50 = 0.3. Budget at 0.2: 50 of 250 weights;
    epsilon = 50 / (0.15 * 200 + 0.3 * 50) = 10 / 9."""
    densities = erdos_renyi({"a": (10, 20), "b": (10, 5)}, {}, 0.2)
    assert densities == pytest.approx({"a": 1 / 6, "b": 1 / 3})
    # At 0.7, epsilon = 175 / 45 makes b 1.17: dense. a gets the other 125 of its 200.
    densities = erdos_renyi({"a": (10, 20), "b": (10, 5)}, {}, 0.7)
    assert densities["b"] == 1.0 and densities["a"] == pytest.approx(0.625)
    # b kept dense by the user counts in the budget: 100 of 250 less its 50.
    densities = erdos_renyi({"a": (10, 20)}, {"b": (10, 5)}, 0.4)
    assert densities == pytest.approx({"a": 0.25})


def test_er_ignores_the_kernel_and_erk_does_not() -> None:
    shapes = {"a": (8, 8, 3, 3), "b": (16, 16, 1, 1)}
    er, erk = erdos_renyi(shapes, {}, 0.1), erdos_renyi_kernel(shapes, {}, 0.1)
    assert er["a"] / er["b"] == pytest.approx((16 / 64) / (32 / 256))
    assert erk["a"] / erk["b"] == pytest.approx((22 / 576) / (34 / 256))


def test_layers_kept_dense_may_exceed_the_density() -> None:
    with pytest.raises(InputError, match=r"density 0.1 cannot be reached.*\(big\)"):
        erdos_renyi_kernel({"a": (10, 10)}, {"big": (100, 100)}, 0.1)


def test_uniform() -> None:
    assert uniform({"a": (3, 4), "b": (5, 6)}, {"c": (100, 100)}, 0.1) == {"a": 0.1, "b": 0.1}


# Sparsify.


@pytest.mark.parametrize("distribution", sorted(DISTRIBUTIONS))
@pytest.mark.parametrize("block", [1, (2, 4), 3])
def test_density_is_exact_in_every_layer(distribution: str, block: Any) -> None:
    model = sparsify(_cnn(), density=0.4, distribution=distribution, block=block)
    shapes = {row.name: row.shape for row in density_table(model)}
    sparse = sparse_layers(model)
    candidates = {n: s for n, s in shapes.items() if distribution != "uniform" or n != "0"}
    kept = {n: s for n, s in shapes.items() if n not in candidates}
    bh, bw = (block, block) if isinstance(block, int) else block
    small = {n for n, s in candidates.items() if s[0] < bh or s[1] < bw}
    kept |= {n: candidates.pop(n) for n in small}
    wanted = DISTRIBUTIONS[distribution](candidates, kept, 0.4)
    for name, layer in sparse.items():
        grid = layer.topology.grid
        assert grid.block == (bh, bw)
        assert layer.topology.alive == layer.topology.capacity == round(wanted[name] * grid.size)
        assert layer.alive == int((_ones(layer) != 0).sum())
    assert set(sparse) == {n for n, share in wanted.items() if share < 1}
    rows = {row.name: row for row in density_table(model)}
    for name, row in rows.items():
        assert row.total == torch.Size(shapes[name]).numel()
        assert row.alive == (sparse[name].alive if name in sparse else row.total)
    total = sum(row.total for row in rows.values())
    assert model_density(model) == sum(row.alive for row in rows.values()) / total


def _ones(layer: SparseLayer) -> Tensor:
    layer = copy.deepcopy(layer)
    layer.set_weight(torch.ones_like(layer.dense_weight()))
    return layer.dense_weight()


@pytest.mark.parametrize(
    ("distribution", "density", "skip", "dense"),
    [
        ("uniform", 0.3, None, {"0"}),
        ("uniform", 0.3, (), set()),
        ("uniform", 0.3, ("last",), {"3"}),
        ("uniform", 0.3, ("first", "2"), {"0", "2"}),
        ("erk", 0.3, None, set()),
        ("erk", 0.6, ("first", "last"), {"0", "3"}),
        ("er", 0.6, ("[03]",), {"0", "3"}),
    ],
)
def test_skip(distribution: str, density: float, skip: Any, dense: set[str]) -> None:
    model = sparsify(_mlp(), density=density, distribution=distribution, skip=skip)
    assert {row.name for row in density_table(model) if row.block is None} == dense


def test_skip_patterns_follow_the_names() -> None:
    model = nn.ModuleDict({"stem": nn.Linear(8, 8), "body": _mlp(), "head": nn.Linear(8, 8)})
    sparsify(model, density=0.3, skip=("body.*", "st?m"))
    assert set(sparse_layers(model)) == {"head"}


def test_a_skip_pattern_that_matches_nothing_is_refused() -> None:
    with pytest.raises(InputError, match=r"skip pattern 'conv\*' matches none of 0, 2, 3"):
        sparsify(_mlp(), density=0.3, skip=("conv*",))


@pytest.mark.parametrize("density", [0, 0.0, 1, 1.5, -0.1, float("nan"), float("inf")])
def test_densities_outside_are_refused(density: float) -> None:
    model = _mlp()
    with pytest.raises(InputError, match=f"density {density} must lie strictly between 0 and 1"):
        sparsify(model, density=density)
    assert not sparse_layers(model)


def test_a_layer_too_small_for_one_connection_is_named() -> None:
    model = _mlp()
    with pytest.raises(InputError, match=r"layer '3': density 0.001 of 10 x 40 .* no block"):
        sparsify(model, density=0.001)
    assert not sparse_layers(model)  # nothing was converted before the error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"distribution": "normal"}, "choose uniform, er, erk"),
        ({"init": "zero"}, "choose sparse-aware, keep"),
        ({"block": 0}, "must be positive"),
        ({"block": 64}, "larger than every layer that may be sparse"),
        ({"block": (1, 64)}, "larger than every layer that may be sparse"),
        ({"compute": "fast"}, "choose auto, dense, sparse"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        sparsify(_mlp(), density=0.3, **arguments)


def test_layers_smaller_than_a_block_stay_dense_and_are_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING, logger="dst"):
        model = sparsify(_mlp(), density=0.3, block=16, distribution="erk")
    assert set(sparse_layers(model)) == {"0", "2"}
    assert [record.getMessage() for record in caplog.records] == [
        "smaller than one block of (16, 16), kept dense: 3"
    ]


def test_a_convolution_is_as_wide_as_its_channels(caplog: pytest.LogCaptureFixture) -> None:
    """3 channels at 9 taps are 27 inputs, and yet smaller than a block of 4."""
    model = sparsify(_cnn(), density=0.3, block=4, distribution="erk")
    assert "0" not in sparse_layers(model) and "kept dense: 0" in caplog.text


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(InputError, match=r"Sequential has no nn\.Linear or nn\.Conv2d"):
        sparsify(nn.Sequential(nn.ReLU()), density=0.3)


def test_padding_modes_are_refused_unless_skipped() -> None:
    layer = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")
    model = nn.Sequential(nn.Conv2d(3, 4, 3), layer, nn.Conv2d(4, 4, 3))
    with pytest.raises(InputError, match="layer '1' pads with 'reflect'"):
        sparsify(model, density=0.3)
    sparsify(model, density=0.3, skip=("first", "1"))
    assert set(sparse_layers(model)) == {"2"}


def test_convolutions_with_groups_stay_dense_and_are_named(caplog) -> None:
    def net() -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3, groups=4), nn.Conv2d(8, 4, 3))

    model = sparsify(net(), density=0.5, distribution="erk")
    assert set(sparse_layers(model)) == {"0", "2"}
    assert "groups, kept dense: 1" in caplog.text
    # They count: the others make up for them.
    assert abs(model_density(model) - 0.5) < 0.01
    caplog.clear()
    sparsify(net(), density=0.5, skip=("1",))
    assert not caplog.text
    with pytest.raises(InputError, match="no layer that could be sparse but convolutions with"):
        sparsify(net(), density=0.5, skip=("0", "2"))


def test_tied_weights_are_refused_unless_skipped() -> None:
    model = nn.ModuleDict(
        {"first": nn.Linear(9, 8), "embedding": nn.Embedding(9, 8), "head": nn.Linear(8, 9),
         "other": nn.Linear(8, 9)}
    )  # fmt: skip
    model["head"].weight = model["embedding"].weight
    with pytest.raises(InputError, match="layer 'head' shares its weight with embedding"):
        sparsify(model, density=0.3)
    sparsify(model, density=0.3, skip=("head",))
    assert model["head"].weight is model["embedding"].weight


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_weights_computed_from_others_are_refused_unless_skipped() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.utils.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 4))
    with pytest.raises(InputError, match="'1' is computed from other parameters"):
        sparsify(model, density=0.5)
    sparsify(model, density=0.5, skip=("1",))
    parametrized = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    nn.utils.parametrizations.orthogonal(parametrized[1])
    sparsify(parametrized, density=0.5, skip=())
    assert set(sparse_layers(parametrized)) == {"0", "2"}


def test_shared_modules_stay_shared() -> None:
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": shared, "c": nn.Sequential(shared)})
    sparsify(model, density=0.3, skip=())
    assert isinstance(model["b"], SparseLinear) and model["c"][0] is model["b"]
    densify(model)
    assert type(model["b"]) is nn.Linear and model["c"][0] is model["b"]


def test_subclasses_are_left_alone() -> None:
    class Own(nn.Linear):
        pass

    model = sparsify(nn.Sequential(nn.Linear(8, 8), Own(8, 8)), density=0.5, skip=())
    assert set(sparse_layers(model)) == {"0"}


def test_a_root_module_that_is_a_layer() -> None:
    linear = nn.Linear(8, 6)
    sparse = sparsify(linear, density=0.5)
    assert isinstance(sparse, SparseLinear) and sparse.bias is linear.bias
    dense = densify(sparse)
    assert type(dense) is nn.Linear
    assert isinstance(sparsify(nn.Conv2d(3, 4, 3), density=0.5), SparseConv2d)


def test_the_model_itself_is_changed() -> None:
    model = _mlp()
    assert sparsify(model, density=0.3) is model
    assert densify(model) is model


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_everything_else_is_carried_over() -> None:
    model = _cnn().double()
    model[3].eval()
    model[4].weight.requires_grad_(False)
    model[6].bias.requires_grad_(False)
    biases = {i: model[i].bias for i in (3, 4, 6)}
    for convert in (lambda: sparsify(model, density=0.4, skip=()), lambda: densify(model)):
        convert()
        assert not model[3].training and model[4].training
        assert {i: model[i].bias for i in (3, 4, 6)} == biases
        assert model[0].bias is None
        weights = [m.values if isinstance(m, SparseLayer) else m.weight for m in
                   (model[3], model[4], model[6])]  # fmt: skip
        assert [w.requires_grad for w in weights] == [True, False, True]
        assert all(w.dtype == torch.float64 for w in weights)
        assert not model[6].bias.requires_grad
        assert model(torch.randn(2, 3, 8, 8).double()).dtype == torch.float64


def test_hooks_of_every_kind_are_carried_over_and_can_be_removed() -> None:
    model, calls = _mlp(), []
    layer = model[2]
    handles = [
        layer.register_forward_pre_hook(lambda m, args: calls.append("pre")),
        layer.register_forward_pre_hook(
            lambda m, args, kwargs: calls.append("pre with kwargs"), with_kwargs=True
        ),
        layer.register_forward_hook(lambda m, args, out: calls.append("forward")),
        layer.register_forward_hook(
            lambda m, args, kwargs, out: calls.append("forward with kwargs"), with_kwargs=True
        ),
        layer.register_full_backward_pre_hook(lambda m, dy: calls.append("backward pre")),
        layer.register_full_backward_hook(lambda m, dx, dy: calls.append("backward")),
    ]
    for convert in (lambda: sparsify(model, density=0.3), lambda: densify(model)):
        convert()
        calls.clear()
        model(torch.randn(2, 20)).sum().backward()
        assert sorted(calls) == ["backward", "backward pre", "forward", "forward with kwargs",
                                 "pre", "pre with kwargs"]  # fmt: skip
    for handle in handles:
        handle.remove()
    calls.clear()
    model(torch.randn(2, 20)).sum().backward()
    assert calls == []


@pytest.mark.parametrize("block", [1, (2, 3)])
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_dense_again_gives_the_same_outputs(block: Any) -> None:
    model = _cnn().eval()
    shapes = {name: p.shape for name, p in model.named_parameters()}
    x = torch.randn(2, 3, 8, 8)
    before = model(x)
    sparsify(model, density=0.4, block=block, skip=(), distribution="erk")
    sparse = model(x)
    assert not torch.allclose(before, sparse)
    densify(model)
    assert not sparse_layers(model)
    assert {name: p.shape for name, p in model.named_parameters()} == shapes
    torch.testing.assert_close(model(x), sparse, rtol=1e-4, atol=1e-5)
    assert model[4].padding == "same" and model[3].dilation == (1, 2)


def test_keep_leaves_the_weights_as_they_are() -> None:
    model = _mlp()
    before = model[2].weight.detach().clone()
    sparsify(model, density=0.3, init="keep")
    after = model[2].dense_weight()
    assert torch.equal(after[after != 0], before[after != 0])


def test_sparse_aware_scales_every_output_by_its_own_fan_in() -> None:
    model = _mlp()
    before = model[2].weight.detach().clone()
    sparsify(model, density=0.3)
    after, fan_in = model[2].dense_weight(), model[2].topology.fan_in()
    assert fan_in.unique().numel() > 1
    expected = torch.where(after != 0, before * (30 / fan_in).sqrt()[:, None], 0.0)
    torch.testing.assert_close(after, expected)


@torch.no_grad()
@pytest.mark.parametrize("density", [0.02, 0.1, 0.5])
def test_sparse_aware_keeps_the_variance_of_outputs(density: float) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(1000, 1000, bias=False)
    conv = nn.Conv2d(100, 100, 3, bias=False)
    for layer, x in ((linear, torch.randn(50, 1000)), (conv, torch.randn(4, 100, 8, 8))):
        wanted = float(layer(x).var())
        kept = float(sparsify(copy.deepcopy(layer), density=density, init="keep")(x).var())
        aware = float(sparsify(copy.deepcopy(layer), density=density)(x).var())
        assert aware == pytest.approx(wanted, rel=0.05)
        assert kept == pytest.approx(density * wanted, rel=0.1)


def test_deterministic_in_the_seed_and_blind_to_the_global_state() -> None:
    def keys(seed: int, noise: int) -> list[list[int]]:
        model = _mlp()
        torch.manual_seed(noise)
        state = torch.get_rng_state()
        sparsify(model, density=0.3, seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        return [layer.topology.keys().tolist() for layer in sparse_layers(model).values()]

    assert keys(1, 1) == keys(1, 2)
    assert keys(1, 1) != keys(2, 1)


def test_topologies_follow_the_layer_names_not_their_order() -> None:
    one = nn.ModuleDict({"a": nn.Linear(20, 20), "b": nn.Linear(20, 20)})
    other = nn.ModuleDict({"b": nn.Linear(20, 20), "z": nn.Linear(5, 5)})
    for model in (one, other):
        sparsify(model, density=0.3, skip=())
    assert torch.equal(one["b"].topology.keys(), other["b"].topology.keys())
    assert not torch.equal(one["a"].topology.keys(), one["b"].topology.keys())


def test_topology_is_spread_evenly() -> None:
    layer = sparsify(nn.Linear(400, 300), density=0.1)
    assert isinstance(layer, SparseLinear)
    per_row = layer.topology.fan_in().float()
    per_column = (_ones(layer) != 0).sum(0).float()
    # Hypergeometric: variance n p (1 - p), here 36 and 27.
    assert per_row.mean() == 40 and per_row.var() == pytest.approx(36, rel=0.3)
    assert per_column.mean() == 30 and per_column.var() == pytest.approx(27, rel=0.3)


def test_compute_is_passed_on() -> None:
    model = sparsify(_mlp(), density=0.3, compute="sparse")
    assert model[2].compute == "sparse"
    expected = F.linear(torch.ones(1, 30), model[2].dense_weight(), model[2].bias)
    torch.testing.assert_close(model[2](torch.ones(1, 30)), expected)


def test_grid_of_a_convolution_counts_channels_by_tap() -> None:
    model = sparsify(nn.Conv2d(5, 7, (3, 2)), density=0.5, block=(2, 3))
    assert model.topology.grid == Grid(4, 12, 7, 6, 5, (2, 3))


@pytest.mark.parametrize("training", [False, True])
def test_a_transformer_encoder_works_in_both_modes(training: bool) -> None:
    """PyTorch's fused inference path reads the weights of the layers that were replaced."""
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True), 2
    )
    sparsify(encoder, density=0.5, skip=())
    encoder.train(training)
    x, mask = torch.randn(3, 5, 16), torch.zeros(3, 5, dtype=torch.bool)
    mask[1, 3:] = True
    with torch.no_grad():
        first = encoder(x, src_key_padding_mask=mask)
        second = densify(encoder)(x, src_key_padding_mask=mask)
    keep = ~mask
    assert torch.allclose(first[keep], second[keep], atol=1e-6)
