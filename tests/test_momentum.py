"""Growth by a decayed sum of the whole gradient."""

import pytest
import torch
from torch import nn

import growth
from growth import ConvPairs, Exact, InputError, JoinedPairs, LinearPairs, Momentum, StoredGradient

NONE = torch.empty(0, dtype=torch.int64)


def _keys(found: growth.Connections, n_cols: int) -> list[int]:
    return (found.row * n_cols + found.col).tolist()


def test_the_sum_decays() -> None:
    strategy, state, expected = Momentum(decay=0.5), None, torch.zeros(3, 4)
    for _ in range(4):
        x, dz = torch.randn(6, 4), torch.randn(6, 3)
        state = strategy.observe((x, dz), state)
        expected = 0.5 * expected + dz.T @ x
    assert torch.allclose(state, expected, atol=1e-6)
    order = expected.abs().flatten().argsort(descending=True)
    active = order[:2].sort().values
    found = strategy((x, dz), 3, active, state=state)
    assert _keys(found, 4) == sorted(order[2:5].tolist())
    assert torch.allclose(found.score, expected.abs()[found.row, found.col])
    # Searching leaves the sum alone.
    assert torch.allclose(state, expected, atol=1e-6)


@pytest.mark.parametrize("block", [(1, 1), (2, 2), (3, 1)])
def test_without_a_past_it_is_the_gradient_of_the_step(block: tuple[int, int]) -> None:
    x, dz = torch.randn(6, 9), torch.randn(6, 7)
    state = Momentum().observe((x, dz), None)
    exact = Exact()((x, dz), 5, NONE, block=block)
    for found in (
        Momentum()((x, dz), 5, NONE, block=block),
        Momentum()((x, dz), 5, NONE, block=block, state=state),
    ):
        assert torch.equal(found.row, exact.row) and torch.equal(found.col, exact.col)
        assert torch.allclose(found.score, exact.score, rtol=1e-5)


def test_convolutions_and_joined_recordings() -> None:
    conv = nn.Conv2d(3, 5, 3, stride=2, padding=1)
    x = torch.randn(4, 3, 7, 7)
    with growth.record(nn.Sequential(conv)) as records:
        conv(x[:1]).square().sum().backward()
        conv(x[1:]).square().sum().backward()
    pairs = records["0"]
    assert isinstance(pairs, JoinedPairs)
    state = Momentum().observe(pairs, None)
    expected = conv.weight.grad.permute(0, 2, 3, 1).flatten(1)
    assert torch.allclose(state, expected, atol=1e-4)
    found = Momentum()(pairs, 4, NONE, block=(2, 2), state=state)
    again = Exact()(pairs, 4, NONE, block=(2, 2))
    assert torch.equal(found.row, again.row) and torch.equal(found.col, again.col)


def test_half_precision_is_summed_in_single() -> None:
    x, dz = torch.randn(6, 4).half(), torch.randn(6, 3).half()
    state = Momentum().observe((x, dz), None)
    assert state.dtype == torch.float32
    assert torch.allclose(state, dz.float().T @ x.float(), atol=1e-6)


def test_a_loss_scale_is_divided_out() -> None:
    x, dz = torch.randn(6, 4), torch.randn(6, 3)
    state = Momentum().observe(LinearPairs(x, dz * 1024, scale=1 / 1024), None)
    assert torch.allclose(state, dz.T @ x, atol=1e-5)


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_decays_that_cannot_be(decay: float) -> None:
    with pytest.raises(InputError, match="momentum decay"):
        Momentum(decay)


def test_another_layers_sum_is_refused() -> None:
    x, dz = torch.randn(6, 4), torch.randn(6, 3)
    for call in (
        lambda: Momentum().observe((x, dz), torch.zeros(4, 3)),
        lambda: Momentum()((x, dz), 1, NONE, state=torch.zeros(4, 3)),
    ):
        with pytest.raises(InputError, match="another layer's"):
            call()


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_a_step_or_a_sum_that_is_not_finite_is_refused(poison: float) -> None:
    x, dz = torch.randn(6, 4), torch.randn(6, 3)
    with pytest.raises(InputError, match="momentum holds NaN or inf"):
        Momentum()((x, dz), 1, NONE, state=torch.full((3, 4), poison))
    state = Momentum().observe((x, dz), None)
    before, bad = state.clone(), x.clone()
    bad[2, 1] = poison
    with pytest.raises(InputError, match="do not observe this step"):
        Momentum().observe((bad, dz), state)
    assert torch.equal(state, before)


def test_a_sum_of_another_type_is_refused() -> None:
    x, dz = torch.randn(6, 4).double(), torch.randn(6, 3).double()
    with pytest.raises(InputError, match=r"float32.*float64"):
        Momentum().observe((x, dz), torch.zeros(3, 4))


def test_stored_gradients() -> None:
    gradient = torch.randn(6, 8)
    pairs = StoredGradient(gradient, taps=4)
    tile = pairs.products(2, 5)
    assert torch.equal(tile, gradient[2:5])
    tile.zero_()
    assert bool(gradient[2:5].any())
    found = Exact()(pairs, 3, NONE, block=(1, 2))
    score = gradient.view(6, 4, 2).norm(dim=2).flatten()
    assert _keys(found, 4) == score.topk(3).indices.sort().values.tolist()
    for bad in (torch.zeros(3), torch.zeros(2, 2, dtype=torch.int64), torch.zeros(0, 3)):
        with pytest.raises(InputError, match="must be a floating point matrix"):
            StoredGradient(bad)


@pytest.mark.parametrize("rows", [(0, 5), (2, 4), (4, 5)])
def test_rows_of_a_recording(rows: tuple[int, int]) -> None:
    x, dz = torch.randn(6, 4), torch.randn(6, 5)
    conv_x, conv_dz = torch.randn(2, 3, 6, 6), torch.randn(2, 5, 4, 4)
    for whole in (
        LinearPairs(x, dz),
        ConvPairs(conv_x, conv_dz, (3, 3)),
        JoinedPairs([LinearPairs(x, dz), LinearPairs(x + 1, dz)]),
    ):
        part = growth.RowPairs(whole, *rows)
        assert part.n_out == rows[1] - rows[0] and part.samples == whole.samples
        full = whole.products(0, 5)[slice(*rows)]
        assert torch.allclose(part.products(0, part.n_out), full, atol=1e-5)
        assert torch.allclose(sum(d.T @ v for v, d in part.chunks()), full, atol=1e-4)
        of_x, of_dz = part.squared_norms()
        assert of_dz.shape == (part.n_out,) and of_x.shape == (whole.n_in,)
    with pytest.raises(InputError, match="rows 3 to 9 are not rows of 5"):
        growth.RowPairs(whole, 3, 9)
