"""Sparse attention: what nn.MultiheadAttention computes, head by head sparse, and counted."""

from __future__ import annotations

import copy
import io
import itertools
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import growth
from dst import (
    InputError,
    SparseLinear,
    TopologyUpdater,
    UpdateSchedule,
    densify,
    density_table,
    model_density,
    rigl,
    sparse_layers,
    sparsify,
)
from dst.attention import SparseAttention
from dst.distributions import erdos_renyi
from dst.flops import LayerCost, layer_costs

WIDTH, HEADS = 12, 3


def _attention(**options: Any) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(WIDTH, HEADS, **options).double()
    if attention.in_proj_bias is not None:
        nn.init.normal_(attention.in_proj_bias)
        nn.init.normal_(attention.out_proj.bias)
    return attention


def _twins(**options: Any) -> tuple[nn.Module, nn.Module]:
    """A sparse attention, and the dense one that holds its zeros."""
    sparse = sparsify(_attention(**options), density=0.5, skip=())
    assert isinstance(sparse, SparseAttention)
    dense = densify(copy.deepcopy(sparse))
    assert type(dense) is nn.MultiheadAttention
    return sparse, dense


def _encoder(layers: int = 2, **options: Any) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    options = {"dropout": 0.0, "batch_first": True, **options}
    layer = nn.TransformerEncoderLayer(16, 4, 24, **options)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=not layer.norm_first)


# What it computes.


def _inputs(batch_first: bool, batched: bool, lengths: tuple[int, ...]) -> list[Tensor]:
    made = [torch.randn(2, length, WIDTH, dtype=torch.float64) for length in lengths]
    if not batched:
        return [x[0] for x in made]
    return made if batch_first else [x.transpose(0, 1) for x in made]


@pytest.mark.parametrize("kind", ["self", "memory", "three inputs", "query is key"])
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_it_equals_the_dense_one(batch_first: bool, batched: bool, kind: str) -> None:
    sparse, dense = _twins(batch_first=batch_first, bias=kind != "memory")
    query, other, third = _inputs(batch_first, batched, (5, 7, 7))
    match kind:
        case "self":
            inputs = (query, query, query)
        case "memory":
            inputs = (query, other, other)
        case "three inputs":
            inputs = (query, other, third)
        case _:
            inputs = (query, query, torch.randn_like(query))
    length, sources = 5, inputs[1].shape[1 if batch_first and batched else 0]
    attn_masks = [None, torch.ones(length, sources).triu(1).bool()]
    attn_masks.append(torch.randn(length, sources, dtype=torch.float64))
    if batched:
        attn_masks.append(torch.randn(2 * HEADS, length, sources, dtype=torch.float64))
    padding = torch.zeros(2, sources, dtype=torch.bool)
    padding[0, -2:] = True
    for attn_mask, padded, need_weights, average, training in itertools.product(
        attn_masks, (False, True), (False, True), (False, True), (False, True)
    ):
        key_padding_mask = padding if batched else padding[0]
        if attn_mask is not None and attn_mask.is_floating_point():  # both are of one type
            zeros = torch.zeros(key_padding_mask.shape, dtype=torch.float64)
            key_padding_mask = zeros.masked_fill(key_padding_mask, float("-inf"))
        arguments = {
            "key_padding_mask": key_padding_mask if padded else None,
            "need_weights": need_weights,
            "attn_mask": attn_mask,
            "average_attn_weights": average,
        }
        output, weights = sparse.train(training)(*inputs, **arguments)
        expected, expected_weights = dense.train(training)(*inputs, **arguments)
        torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
        assert (weights is None) == (expected_weights is None) == (not need_weights)
        if need_weights:
            torch.testing.assert_close(weights, expected_weights, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("need_weights", [False, True])
def test_causal_hint(need_weights: bool, padded: bool) -> None:
    sparse, dense = _twins(batch_first=True)
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64)
    mask = torch.ones(5, 5).triu(1).bool()
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[1, 4] = padded
    for module in (sparse, dense):
        module.train()
    arguments = {"attn_mask": mask, "is_causal": True, "need_weights": need_weights}
    arguments["key_padding_mask"] = padding if padded else None
    torch.testing.assert_close(sparse(x, x, x, **arguments), dense(x, x, x, **arguments))
    without = sparse(x, x, x, **{**arguments, "attn_mask": None, "is_causal": False})
    assert not torch.allclose(without[0], sparse(x, x, x, **arguments)[0])
    with pytest.raises(InputError, match="is_causal is a hint"):
        sparse(x, x, x, is_causal=True)


@pytest.mark.parametrize("need_weights", [False, True])
def test_dropout_acts_on_attention_weights_in_training_only(need_weights: bool) -> None:
    sparse, dense = _twins(batch_first=True, dropout=0.4)
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64)

    def run(module: nn.Module, training: bool) -> Tensor:
        torch.manual_seed(1)
        output: Tensor = module.train(training)(x, x, x, need_weights=need_weights)[0]
        return output

    torch.testing.assert_close(run(sparse, True), run(dense, True))
    torch.testing.assert_close(run(sparse, False), run(dense, False))
    assert not torch.allclose(run(sparse, True), run(sparse, False))


def test_gradients_are_those_of_the_dense_one() -> None:
    sparse, dense = _twins()
    query, memory = torch.randn(5, 2, WIDTH).double(), torch.randn(7, 2, WIDTH).double()
    found = []
    for module in (sparse, dense):
        inputs = [query.clone().requires_grad_(), memory.clone().requires_grad_()]
        output, _ = module(inputs[0], inputs[1], inputs[1])
        (output.sin().sum() + module(inputs[0], inputs[0], inputs[0])[0].sum()).backward()
        found.append([x.grad for x in inputs])
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-10)
    for name, gradient in (
        ("in_proj", dense.in_proj_weight.grad),
        ("out_proj", dense.out_proj.weight.grad),
    ):
        layer = sparse.get_submodule(name)
        expected = copy.deepcopy(layer)
        expected.set_weight(gradient)
        torch.testing.assert_close(layer.values.grad, expected.values, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(sparse.in_proj.bias.grad, dense.in_proj_bias.grad)


@pytest.mark.parametrize(
    ("shapes", "masks", "said"),
    [
        (((5, 2, 9),) * 3, {}, r"query \(5, 2, 9\).* must be \(length, 12\)"),
        (((5, 2, 12), (7, 2, 12), (6, 2, 12)), {}, "key and value alike"),
        (((5, 2, 12), (7, 3, 12), (7, 3, 12)), {}, "batch dimension second"),
        (((5, 12), (7, 2, 12), (7, 2, 12)), {}, "must be"),
        (((5, 2, 12),) * 3, {"attn_mask": (5, 6)}, r"attn_mask \(5, 6\) must be \(5, 5\) or \(6,"),
        (((5, 2, 12),) * 3, {"key_padding_mask": (5, 2)}, r"\(5, 2\) must be \(2, 5\)"),
    ],
)
def test_shapes_that_do_not_belong_together(shapes: Any, masks: Any, said: str) -> None:
    sparse, _ = _twins()
    inputs = [torch.zeros(shape, dtype=torch.float64) for shape in shapes]
    masks = {name: torch.zeros(shape) for name, shape in masks.items()}
    with pytest.raises(InputError, match=said):
        sparse(*inputs, **masks)


def test_masks_of_whole_numbers_and_sizes_that_cannot_be_are_refused() -> None:
    sparse, _ = _twins()
    x = torch.zeros(5, 2, WIDTH, dtype=torch.float64)
    with pytest.raises(InputError, match=r"boolean or floating point, not torch\.uint8"):
        sparse(x, x, x, attn_mask=torch.zeros(5, 5, dtype=torch.uint8))
    with pytest.raises(InputError, match="must be 4 -> 12 and 4 -> 4, not to 8 and from 4"):
        SparseAttention(nn.Linear(4, 8), nn.Linear(4, 4), 2)
    with pytest.raises(InputError, match="num_heads 3 must divide the width 4"):
        SparseAttention(nn.Linear(4, 12), nn.Linear(4, 4), 3)


# Conversion.


def test_both_projections_become_sparse_and_dense_again() -> None:
    model = _encoder()
    before = {name: p.shape for name, p in model.state_dict().items()}
    names = [row.name for row in density_table(model)]
    biases = {id(p) for name, p in model.named_parameters() if name.endswith("bias")}
    model.layers[1].self_attn.eval()
    model.layers[1].self_attn.in_proj_weight.requires_grad_(False)
    calls: list[str] = []
    model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append("attention"))
    x = torch.randn(2, 5, 16)
    for convert in (lambda: sparsify(model, density=0.3, skip=()), lambda: densify(model)):
        convert()
        calls.clear()
        model(x)
        assert calls == ["attention"]
        assert model.layers[0].self_attn.training and not model.layers[1].self_attn.training
        assert biases == {id(p) for name, p in model.named_parameters() if name.endswith("bias")}
        assert [row.name for row in density_table(model)] == names
        if isinstance(model.layers[1].self_attn, SparseAttention):
            assert set(sparse_layers(model)) == set(names)
            assert not model.layers[1].self_attn.in_proj.values.requires_grad
            assert model.layers[1].self_attn.out_proj.values.requires_grad
    assert {name: p.shape for name, p in model.state_dict().items()} == before
    assert not model.layers[1].self_attn.in_proj_weight.requires_grad


@pytest.mark.parametrize("kept", ["in_proj", "out_proj"])
def test_one_projection_may_be_kept_dense(kept: str) -> None:
    attention = _attention()
    weight = {"in_proj": attention.in_proj_weight, "out_proj": attention.out_proj.weight}[kept]
    x = torch.randn(5, 2, WIDTH, dtype=torch.float64)
    model = sparsify(nn.ModuleDict({"a": attention}), density=0.5, skip=(f"*.{kept}",))
    other = {"in_proj": "a.out_proj", "out_proj": "a.in_proj"}[kept]
    assert set(sparse_layers(model)) == {other}
    assert type(model["a"].get_submodule(kept)) is nn.Linear
    assert model["a"].get_submodule(kept).weight is weight
    output = model["a"](x, x, x)
    densify(model)
    assert type(model["a"]) is nn.MultiheadAttention
    torch.testing.assert_close(model["a"](x, x, x), output)
    assert weight is (
        model["a"].in_proj_weight if kept == "in_proj" else model["a"].out_proj.weight
    )


def test_an_attention_kept_dense_as_a_whole_is_not_touched() -> None:
    attention = _attention()
    model = nn.ModuleDict({"a": attention, "b": nn.Linear(8, 8)})
    sparsify(model, density=0.5, skip=("a.*",))
    assert model["a"] is attention and set(sparse_layers(model)) == {"b"}
    with pytest.raises(InputError, match="no block"):
        sparsify(nn.ModuleDict({"a": attention, "b": nn.Linear(2, 2)}), density=0.05, skip=())
    assert model["a"] is attention


@pytest.mark.parametrize("options", [{"kdim": 6}, {"add_bias_kv": True}, {"add_zero_attn": True}])
def test_kinds_that_stay_dense_are_named(
    options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    model = nn.ModuleDict({"own": _attention(**options), "fc": nn.Linear(8, 8).double()})
    with caplog.at_level(logging.WARNING, logger="dst"):
        sparsify(model, density=0.5, skip=())
    assert caplog.messages == [
        "attention with kdim, vdim, bias_k, add_zero_attn or weights that are computed, kept "
        "dense: own"
    ]
    assert set(sparse_layers(model)) == {"fc"}
    query, key = torch.zeros(5, 1, WIDTH), torch.zeros(7, 1, options.get("kdim", WIDTH))
    model["own"](query.double(), key.double(), torch.zeros(7, 1, WIDTH).double())
    rows = {row.name: row.total for row in density_table(model)}
    if "kdim" in options:
        expected = {"own.q_proj": 144, "own.k_proj": 72, "own.v_proj": 144, "own.out_proj": 144}
    else:
        expected = {"own.in_proj": 432, "own.out_proj": 144}
    assert rows == {**expected, "fc": 64}


def test_weights_that_two_attentions_share_are_refused() -> None:
    model = nn.ModuleDict({"a": _attention(), "b": _attention()})
    model["b"].in_proj_weight = model["a"].in_proj_weight
    with pytest.raises(InputError, match=r"layer 'a\.in_proj' shares its weight with b\.in_proj"):
        sparsify(model, density=0.5, skip=())
    assert not sparse_layers(model) and type(model["a"]) is nn.MultiheadAttention


# Head by head.


@pytest.mark.parametrize("block", [1, 2])
def test_every_head_starts_with_equally_many_connections(block: int) -> None:
    model = sparsify(_encoder(1), density=0.3, skip=(), block=block)
    layers = sparse_layers(model)
    assert {name: layer.row_groups for name, layer in layers.items()} == {
        "layers.0.self_attn.in_proj": 12,
        "layers.0.self_attn.out_proj": 1,
        "layers.0.linear1": 1,
        "layers.0.linear2": 1,
    }
    topology = layers["layers.0.self_attn.in_proj"].topology
    rows, columns = 4 // block, 16 // block  # of each of 12 groups, in blocks
    per_group = torch.bincount(topology.rows() // rows, minlength=12)
    assert per_group.tolist() == [round(0.3 * rows * columns)] * 12
    # Each draws by itself.
    keys = topology.keys().view(12, -1) % (rows * columns)
    assert len({tuple(group) for group in keys.tolist()}) > 6
    assert "row_groups=12" in repr(layers["layers.0.self_attn.in_proj"])


def test_er_takes_each_group_for_a_matrix_of_its_own() -> None:
    model = nn.Sequential(_attention(), nn.Linear(40, 30))
    sparsify(model, density=0.3, distribution="er", skip=())
    shapes = {f"head {at}": (4, WIDTH) for at in range(9)}
    wanted = erdos_renyi({**shapes, "out": (12, 12), "fc": (30, 40)}, {}, 0.3)
    assert wanted["head 0"] == pytest.approx(wanted["head 8"])
    found = {row.name: row.alive for row in density_table(model)}
    assert found == {
        "0.in_proj": 9 * round(wanted["head 0"] * 48),
        "0.out_proj": round(wanted["out"] * 144),
        "1": round(wanted["fc"] * 1200),
    }


def test_blocks_that_do_not_fit_into_a_head(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="dst"):
        model = sparsify(nn.Sequential(_attention()), density=0.5, block=(3, 2), skip=())
    assert caplog.messages == [
        "an attention head is not whole blocks of (3, 2), sparse without regard to heads: 0.in_proj"
    ]
    assert sparse_layers(model)["0.in_proj"].row_groups == 1
    assert sparse_layers(model)["0.in_proj"].alive == 216


def test_a_density_that_starves_a_head_is_refused() -> None:
    with pytest.raises(InputError, match=r"'0\.in_proj', in each head: density 0\.01 of 4 x 12"):
        sparsify(nn.Sequential(_attention(), nn.Linear(99, 99)), density=0.01, skip=())


def test_a_joint_projection_beside_num_heads_is_one_of_heads() -> None:
    class Attention(nn.Module):
        def __init__(self, n_out: int, heads: Any) -> None:
            super().__init__()
            self.num_heads = heads
            self.qkv = nn.Linear(8, n_out)
            self.proj = nn.Linear(8, 8)

    model = nn.ModuleDict(
        {"yes": Attention(24, 2), "ragged": Attention(24, 3), "wide": Attention(32, 2),
         "none": Attention(24, None), "conv": Attention(24, 2)}
    )  # fmt: skip
    model["conv"].qkv = nn.Conv2d(8, 24, 1)
    sparsify(model, density=0.5, skip=())
    grouped = {name: la.row_groups for name, la in sparse_layers(model).items()}
    assert {name for name, groups in grouped.items() if groups > 1} == {"yes.qkv"}
    assert grouped["yes.qkv"] == 6


# Counting.


def test_dense_attention_is_counted() -> None:
    """Per block of width 16: 48 x 16 + 16 x 16 of attention, 2 x 16 x 24 of the MLP."""
    dense, sparse = _encoder(), sparsify(_encoder(), density=0.25, skip=())
    assert sum(row.total for row in density_table(dense)) == 2 * (4 * 256 + 2 * 384)
    assert model_density(dense) == 1.0 and model_density(sparse) == pytest.approx(0.25)
    example = torch.zeros(1, 5, 16)
    for training in (True, False):
        costs = layer_costs(dense.train(training), example)
        assert costs["layers.1.self_attn.in_proj"] == LayerCost(5 * 768, 5 * 768)
        assert costs["layers.1.self_attn.out_proj"] == LayerCost(5 * 256, 5 * 256)
        found = layer_costs(sparse.train(training), example)
        assert found == {
            name: LayerCost(cost.dense // 4, cost.dense) for name, cost in costs.items()
        }


def test_dense_attention_between_two_sequences_is_counted() -> None:
    class Cross(nn.Module):
        def __init__(self, **options: Any) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **options)

        def forward(self, x: Tensor) -> Tensor:
            memory = x[:, :2, : self.attention.kdim]
            output: Tensor = self.attention(x, key=memory, value=x[:, :2])[0]
            return output

    costs = layer_costs(Cross(), torch.zeros(1, 5, 8))
    assert costs["attention.in_proj"].dense == (5 + 2 + 2) * 64
    assert costs["attention.out_proj"].dense == 5 * 64
    costs = layer_costs(Cross(kdim=4), torch.zeros(1, 5, 8))
    assert {name: cost.dense for name, cost in costs.items()} == {
        "attention.q_proj": 5 * 64,
        "attention.k_proj": 2 * 32,
        "attention.v_proj": 2 * 64,
        "attention.out_proj": 5 * 64,
    }


# Inside of transformers, and what is done with them.


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("skip", [(), ("*.linear?",), ("*.self_attn.*",)])
def test_encoders_leave_their_fused_inference_path(skip: Any, norm_first: bool) -> None:
    encoder = sparsify(_encoder(norm_first=norm_first), density=0.5, skip=skip).eval()
    x, padding = torch.randn(3, 5, 16), torch.zeros(3, 5, dtype=torch.bool)
    padding[1, 3:] = True
    causal = nn.Transformer.generate_square_subsequent_mask(5).bool()
    with torch.no_grad():
        for masks in ({}, {"src_key_padding_mask": padding}, {"mask": causal}):
            inferred = encoder(x, **masks)
            trained = encoder.train()(x, **masks)
            encoder.eval()
            keep = ~padding if "src_key_padding_mask" in masks else torch.ones(3, 5).bool()
            torch.testing.assert_close(inferred[keep], trained[keep], rtol=1e-4, atol=1e-5)
            fused = densify(copy.deepcopy(encoder))(x, **masks)
            torch.testing.assert_close(inferred[keep], fused[keep], rtol=1e-4, atol=1e-5)


def test_an_encoder_may_be_built_from_a_sparse_layer() -> None:
    layer = sparsify(nn.TransformerEncoderLayer(16, 4, 24, batch_first=True), density=0.5, skip=())
    with pytest.warns(UserWarning, match="use_nested_tensor is False"):
        encoder = nn.TransformerEncoder(layer, 2).eval()
    padding = torch.tensor([[False] * 3 + [True] * 2])
    with torch.no_grad():
        assert encoder(torch.randn(1, 5, 16), src_key_padding_mask=padding).shape == (1, 5, 16)


def test_decoders_attend_to_another_sequence() -> None:
    torch.manual_seed(0)
    model = nn.Transformer(16, 4, 1, 1, 24, dropout=0.0, batch_first=True).double()
    sparsify(model, density=0.5, skip=())
    assert isinstance(model.decoder.layers[0].multihead_attn, SparseAttention)
    source, target = torch.randn(2, 7, 16).double(), torch.randn(2, 5, 16).double()
    mask = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)
    arguments = {"tgt_mask": mask, "tgt_is_causal": True}
    output = model(source, target, **arguments)
    densify(model)
    torch.testing.assert_close(output, model(source, target, **arguments), rtol=1e-9, atol=1e-9)


def test_copies_and_state_dicts_hold_everything() -> None:
    model = sparsify(_encoder(), density=0.5, skip=()).eval()
    x = torch.randn(2, 5, 16)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    again = sparsify(_encoder(), density=0.5, skip=(), seed=7).eval()
    assert not torch.allclose(again(x), model(x))
    again.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(again(x), model(x))
    copied = copy.deepcopy(model)
    assert torch.equal(copied(x), model(x))
    with torch.no_grad():
        copied.layers[0].self_attn.in_proj.values.zero_()
    assert not torch.equal(copied(x), model(x))


@pytest.mark.parametrize("need_weights", [False, True])
def test_autocast_to_bfloat16(need_weights: bool) -> None:
    torch.manual_seed(0)
    attention = sparsify(nn.MultiheadAttention(16, 4, batch_first=True), density=0.5, skip=())
    x, mask = torch.randn(2, 5, 16), torch.ones(5, 5).triu(1).bool()
    expected, _ = attention(x, x, x, attn_mask=mask)
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = attention(x, x, x, attn_mask=mask, need_weights=need_weights)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), expected, rtol=0.05, atol=0.05)
    output.float().sum().backward()
    assert bool(attention.in_proj.values.grad.isfinite().all())


def test_a_compiled_encoder_gives_the_same() -> None:
    torch.compiler.reset()
    model = sparsify(_encoder(1), density=0.5, skip=())
    compiled = torch.compile(model, backend="eager")
    x, padding = torch.randn(2, 5, 16), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    for training in (True, False):
        model.train(training)
        expected = model(x, src_key_padding_mask=padding)
        torch.testing.assert_close(compiled(x, src_key_padding_mask=padding), expected)
    compiled(x).sum().backward()
    gradient = model.layers[0].self_attn.in_proj.values.grad.clone()
    model.zero_grad()
    model(x).sum().backward()
    torch.testing.assert_close(gradient, model.layers[0].self_attn.in_proj.values.grad)


def test_recorded_vectors_make_the_gradient_of_both_projections() -> None:
    sparse, dense = _twins()
    query, memory = torch.randn(5, 2, WIDTH).double(), torch.randn(7, 2, WIDTH).double()
    with growth.record(sparse) as records:
        sparse(query, memory, memory)[0].sin().sum().backward()
    dense(query, memory, memory)[0].sin().sum().backward()
    for name, gradient in (
        ("in_proj", dense.in_proj_weight.grad),
        ("out_proj", dense.out_proj.weight.grad),
    ):
        pairs = records[name]
        torch.testing.assert_close(pairs.products(0, pairs.n_out), gradient)


def test_updates_keep_the_budget_of_every_head() -> None:
    model = sparsify(_encoder(1), density=0.3, skip=())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    updater = TopologyUpdater(model, optimizer, rigl(UpdateSchedule(2, 100, 0.5, "constant")))
    layer = sparse_layers(model)["layers.0.self_attn.in_proj"]
    assert isinstance(layer, SparseLinear)
    before = layer.topology.keys()
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.randn(3, 5, 16)).square().mean().backward()
        if not updater.step():
            optimizer.step()
    assert not torch.equal(layer.topology.keys(), before)
    per_group = torch.bincount(layer.topology.rows() // 4, minlength=12)
    assert per_group.tolist() == [19] * 12
