"""The recorded vectors: convolutions against autograd, and recordings joined."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import growth.pairs
from growth import ConvPairs, InputError, JoinedPairs, LinearPairs, Pairs, to_unfold_order

PAIR = st.tuples(st.integers(1, 3), st.integers(1, 3))


def _weight_gradient(pairs: ConvPairs) -> Tensor:
    """(n_out, C, kh, kw) by autograd, in float64."""
    size = (pairs.n_out, pairs.x.shape[1], *pairs.kernel_size)
    weight = torch.zeros(size, dtype=torch.float64, requires_grad=True)
    y = F.conv2d(pairs.x.double(), weight, None, pairs.stride, pairs.padding, pairs.dilation)
    return torch.autograd.grad(y, weight, pairs.dz.double() * pairs.scale)[0]


def _conv(
    kernel: tuple[int, int],
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    *,
    size: tuple[int, int] = (7, 8),
    batch: int = 3,
    channels: int = 2,
    n_out: int = 5,
    dtype: torch.dtype = torch.float32,
    scale: float = 1.0,
) -> ConvPairs:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, channels, *size, generator=generator, dtype=torch.float64)
    shape = F.conv2d(x, torch.zeros(1, channels, *kernel).double(), None, stride, padding, dilation)
    dz = torch.randn(batch, n_out, *shape.shape[2:], generator=generator, dtype=torch.float64)
    return ConvPairs(x.to(dtype), dz.to(dtype), kernel, stride, padding, dilation, scale)


def _check_products(pairs: Pairs, gradient: Tensor) -> None:
    """gradient: (n_out, C, kh, kw). Both ways to G, whole and a slice of rows."""
    # Columns run over (kh, kw, C).
    expected = gradient.permute(0, 2, 3, 1).flatten(1)
    middle = slice(pairs.n_out // 3, pairs.n_out)
    for own, general in zip(pairs.squared_norms(), Pairs.squared_norms(pairs), strict=True):
        torch.testing.assert_close(own, general, rtol=1e-4, atol=1e-4)
    for products in (type(pairs).products, Pairs.products):
        whole = products(pairs, 0, pairs.n_out)
        assert whole.shape == (pairs.n_out, pairs.n_in)
        torch.testing.assert_close(whole.double(), expected, rtol=1e-4, atol=1e-4)
        part = products(pairs, middle.start, middle.stop)
        torch.testing.assert_close(part.double(), expected[middle], rtol=1e-4, atol=1e-4)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(PAIR, PAIR, st.tuples(st.integers(0, 2), st.integers(0, 2)), PAIR)
def test_products_are_the_weight_gradient(
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> None:
    size = (6, 7)
    fits = [s + 2 * p >= d * (k - 1) + 1
            for s, p, d, k in zip(size, padding, dilation, kernel, strict=True)]  # fmt: skip
    assume(all(fits))
    pairs = _conv(kernel, stride, padding, dilation, size=size)
    _check_products(pairs, _weight_gradient(pairs))
    via_torch = torch.nn.grad.conv2d_weight(
        pairs.x, (5, 2, *kernel), pairs.dz, stride, padding, dilation
    )
    columns = via_torch.permute(0, 2, 3, 1).flatten(1)
    torch.testing.assert_close(pairs.products(0, 5), columns, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"),
    [
        ((1, 1), (1, 1), (0, 0), (1, 1)),
        ((3, 2), (2, 1), (1, 0), (1, 2)),
        ((2, 3), (3, 2), (2, 1), (2, 1)),
    ],
)
def test_columns_in_unfold_order(
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> None:
    pairs = _conv(kernel, stride, padding, dilation)
    unfolded = F.unfold(pairs.x, kernel, dilation, padding, stride)  # (batch, C kh kw, positions)
    unfolded = unfolded.transpose(1, 2).flatten(0, 1)
    x = torch.cat([x for x, _ in pairs.chunks()])
    dz = torch.cat([dz for _, dz in pairs.chunks()])
    order = to_unfold_order(torch.arange(pairs.n_in), 2, pairs.taps)
    assert torch.equal(x, unfolded[:, order])
    assert torch.equal(dz, pairs.dz.permute(0, 2, 3, 1).flatten(0, 2))


@pytest.mark.parametrize("floats", [1, 400, 900, 10**9])
def test_chunks_are_bounded_and_add_up(monkeypatch: pytest.MonkeyPatch, floats: int) -> None:
    pairs = _conv((2, 2), batch=5)  # 42 positions of 8 inputs: 336 floats an example
    whole = list(pairs.chunks())
    monkeypatch.setattr(growth.pairs, "CHUNK_FLOATS", floats)
    chunks = list(pairs.chunks())
    examples = max(1, min(5, floats // 336))
    assert [x.shape[0] // 42 for x, _ in chunks] == [
        min(examples, 5 - start) for start in range(0, 5, examples)
    ]
    assert sum(x.shape[0] for x, _ in chunks) == pairs.samples == 210
    assert len(whole) == 1
    assert torch.equal(torch.cat([x for x, _ in chunks]), whole[0][0])
    assert torch.equal(torch.cat([dz for _, dz in chunks]), whole[0][1])
    again = list(pairs.chunks())
    assert all(torch.equal(a[0], b[0]) for a, b in zip(chunks, again, strict=True))
    _check_products(pairs, _weight_gradient(pairs))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_computed_in_single_precision_or_better(dtype: torch.dtype) -> None:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    pairs = _conv((3, 3), padding=(1, 1), dtype=dtype)
    assert pairs.products(0, 2).dtype == wide
    assert all(t.dtype == wide for chunk in pairs.chunks() for t in chunk)
    _check_products(pairs, _weight_gradient(pairs))
    linear = LinearPairs(torch.ones(4, 3).to(dtype), torch.ones(4, 2).to(dtype))
    assert linear.products(0, 2).dtype == wide


def test_scale_is_applied_in_single_precision() -> None:
    pairs = _conv((3, 2), scale=0.125)
    _check_products(pairs, _weight_gradient(pairs))
    # 6e4 * 2^-20 would vanish in float16.
    x, dz = torch.ones(2, 3).half(), torch.full((2, 4), 6e4).half()
    linear = LinearPairs(x, dz, 2.0**-20)
    expected = torch.full((4, 3), 2 * float(dz[0, 0]) * 2.0**-20)
    assert torch.equal(linear.products(0, 4), expected)
    assert torch.equal(next(iter(linear.chunks()))[1], dz.float() * 2.0**-20)


def test_squared_norms_by_hand() -> None:
    linear = LinearPairs(torch.tensor([[3.0, 1], [4, 1]]), torch.tensor([[2.0], [2]]), 0.5)
    of_x, of_dz = linear.squared_norms()
    assert of_x.tolist() == [25.0, 2.0] and of_dz.tolist() == [2.0]
    joined = JoinedPairs([linear, linear])
    of_x, of_dz = joined.squared_norms()
    assert of_x.tolist() == [50.0, 4.0] and of_dz.tolist() == [4.0]


def test_squared_norms_of_a_convolution(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = _conv((2, 3), (2, 1), (1, 1), (1, 2))
    unfolded = F.unfold(pairs.x, (2, 3), (1, 2), (1, 1), (2, 1))
    of_columns = unfolded.square().sum((0, 2)).view(2, 6).T.flatten()
    monkeypatch.setattr(growth.pairs, "CHUNK_FLOATS", 1)
    of_x, of_dz = pairs.squared_norms()
    torch.testing.assert_close(of_x, of_columns)
    torch.testing.assert_close(of_dz, pairs.dz.square().sum((0, 2, 3)))


def test_linear_products_over_leading_dimensions() -> None:
    x, dz = torch.randn(3, 4, 5), torch.randn(3, 4, 6)
    pairs = LinearPairs(x, dz)
    assert (pairs.samples, pairs.n_in, pairs.n_out, pairs.taps) == (12, 5, 6, 1)
    expected = torch.einsum("abo,abi->oi", dz, x)
    torch.testing.assert_close(pairs.products(0, 6), expected)
    torch.testing.assert_close(pairs.products(2, 4), expected[2:4])


def test_joined_recordings_equal_one_batch() -> None:
    whole = _conv((3, 2), (2, 1), (1, 0), batch=6)
    cut = [(0, 1), (1, 4), (4, 6)]
    geometry = (whole.kernel_size, whole.stride, whole.padding, whole.dilation)
    parts = [ConvPairs(whole.x[a:b], whole.dz[a:b], *geometry) for a, b in cut]
    joined = JoinedPairs(parts)
    assert joined.samples == whole.samples and joined.taps == 6
    torch.testing.assert_close(joined.products(1, 4), whole.products(1, 4))
    torch.testing.assert_close(joined.squared_norms(), whole.squared_norms())
    for side in (0, 1):
        one, other = (torch.cat([c[side] for c in p.chunks()]) for p in (whole, joined))
        assert torch.equal(one, other)


def test_joined_recordings_may_differ_in_image_size_and_scale() -> None:
    small = _conv((3, 3), size=(5, 5), scale=0.5)
    large = _conv((3, 3), size=(9, 6))
    expected = _weight_gradient(small) + _weight_gradient(large)
    _check_products(JoinedPairs([small, large]), expected)


def test_recordings_of_different_layers_are_not_joined() -> None:
    with pytest.raises(InputError, match="no recordings"):
        JoinedPairs([])
    one = LinearPairs(torch.ones(2, 3), torch.ones(2, 4))
    other = LinearPairs(torch.ones(2, 4), torch.ones(2, 3))
    with pytest.raises(InputError, match="different layers"):
        JoinedPairs([one, other])


def test_finite_everywhere() -> None:
    good = LinearPairs(torch.ones(2, 3), torch.ones(2, 3))
    for where, bad in itertools.product(("x", "dz"), (float("nan"), float("-inf"))):
        vectors = {"x": torch.ones(2, 3), "dz": torch.ones(2, 3)}
        vectors[where][1, 1] = bad
        pairs = LinearPairs(**vectors)
        assert not pairs.is_finite() and not JoinedPairs([good, pairs]).is_finite()
    assert JoinedPairs([good, good]).is_finite() and _conv((2, 2)).is_finite()


@pytest.mark.parametrize(
    ("x", "dz", "message"),
    [
        ((2, 3, 5, 5), (2, 4, 5, 5), r"\(5, 5\) positions, but kernel .* make \(3, 3\)"),
        ((2, 3, 5, 5), (1, 4, 3, 3), "same batch"),
        ((3, 5, 5), (4, 3, 3), "same batch"),
    ],
)
def test_recordings_that_do_not_fit_are_refused(
    x: tuple[int, ...], dz: tuple[int, ...], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        ConvPairs(torch.ones(x), torch.ones(dz), (3, 3))
