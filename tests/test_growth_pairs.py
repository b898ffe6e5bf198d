"""The recorded vectors: convolutions against autograd, and recordings joined."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import growth.conv_pairs
import growth.pairs
from growth import (
    ConvPairs,
    InputError,
    JoinedPairs,
    LinearPairs,
    Pairs,
    RowPairs,
    StoredGradient,
    to_unfold_order,
)

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
    """gradient: (n_out, C, kh, kw). Every way to G: whole, a slice of rows, single entries, and
    its product with a matrix from either side."""
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
    keys = torch.arange(1, expected.numel(), 3)
    row, col = keys // pairs.n_in, keys % pairs.n_in
    for entries in (
        pairs.products_at(row, col),
        pairs._single_products(row, col),
        Pairs._single_products(pairs, row, col),
    ):
        assert entries.dtype == whole.dtype
        torch.testing.assert_close(entries.double(), expected[row, col], rtol=1e-4, atol=1e-4)
    right, left = expected.new_ones(2, pairs.n_in).cumsum(1), expected.new_ones(2, pairs.n_out)
    right, left = right.T.to(whole.dtype), left.cumsum(1).T.to(whole.dtype)
    for kind in (type(pairs), Pairs):
        times = kind.times(pairs, right).double()
        torch.testing.assert_close(times, expected @ right.double(), rtol=1e-4, atol=1e-2)
        times = kind.transposed_times(pairs, left).double()
        torch.testing.assert_close(times, expected.T @ left.double(), rtol=1e-4, atol=1e-2)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(PAIR, PAIR, st.tuples(st.integers(0, 3), st.integers(0, 3)), PAIR)
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
    unfolded = [chunk.clone() for chunk, _ in pairs.chunks()]
    with pytest.MonkeyPatch.context() as patch:
        for floats in (1, 2 * pairs.n_in * pairs.dz.shape[3]):
            patch.setattr(growth.conv_pairs, "CHUNK_FLOATS", floats)
            assert torch.equal(torch.cat([x for x, _ in pairs.chunks()]), torch.cat(unfolded))
            _check_products(pairs, _weight_gradient(pairs))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(PAIR, PAIR, st.tuples(st.integers(0, 2), st.integers(0, 2)), PAIR, PAIR, st.booleans())
def test_pooled_recordings_equal_pooled_unfolded_vectors(
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    positions: tuple[int, int],
    half: bool,
) -> None:
    """Averages of 2 x 2 neighbouring positions of x and dz, after unfolding; at the edge of an odd
    map of those that are there, weighted by their number."""
    height, width = (2 * n - n % 2 for n in positions)  # 1, 4, 5
    size = tuple(
        (n - 1) * s + d * (k - 1) + 1 - 2 * p
        for n, s, d, k, p in zip((height, width), stride, dilation, kernel, padding, strict=True)
    )
    assume(min(size) > 0)
    dtype = torch.float16 if half else torch.float64
    pairs = _conv(kernel, stride, padding, dilation, size=size, dtype=dtype, scale=0.5)
    assert pairs.dz.shape[2:] == (height, width)
    pooled = pairs.pooled()
    if min(height, width) < 2:
        assert pooled is pairs
        return
    x, dz = (v.view(3, height, width, -1).double() for v in pairs.vectors())
    expected = torch.zeros(pairs.n_out, pairs.n_in, dtype=torch.float64)
    for top, left in itertools.product(range(0, height, 2), range(0, width, 2)):
        cell = (slice(None), slice(top, top + 2), slice(left, left + 2))
        of_x, of_dz = x[cell].mean((1, 2)), dz[cell].mean((1, 2))
        expected += of_dz.T @ of_x * (x[cell].shape[1] * x[cell].shape[2])
    assert pooled.samples == 3 * -(-height // 2) * -(-width // 2)
    _check_products(pooled, expected.view(5, *kernel, 2).permute(0, 3, 1, 2))


def test_only_maps_are_pooled() -> None:
    linear, conv = LinearPairs(torch.ones(4, 3), torch.ones(4, 5)), _conv((2, 2), size=(5, 5))
    assert linear.pooled() is linear
    joined = JoinedPairs([linear, linear], 0.5)
    assert joined.pooled() is joined and RowPairs(linear, 1, 3).pooled().whole is linear
    halved = JoinedPairs([conv, conv], 0.5).pooled()
    assert isinstance(halved, JoinedPairs) and halved.samples == 2 * conv.samples // 4
    once = conv.pooled().products(0, 5)
    torch.testing.assert_close(halved.products(0, 5), once * 1.5)
    torch.testing.assert_close(RowPairs(conv, 1, 4).pooled().products(0, 3), once[1:4])


def test_narrowed_to_some_outputs_and_channels() -> None:
    rows, channels = torch.tensor([0, 3, 4]), torch.tensor([1, 2])
    conv = _conv((2, 3), channels=4, scale=0.5)
    linear = LinearPairs(torch.randn(6, 4), torch.randn(6, 5), 2.0)
    factors = LinearPairs(torch.randn(6, 24), torch.randn(6, 5), taps=6)
    for pairs in (
        linear,
        factors,
        conv,
        JoinedPairs([conv, conv], 0.25),
        RowPairs(conv, 0, 5),
        RowPairs(JoinedPairs([linear, linear]), 0, 5),
        StoredGradient(torch.randn(5, 24), taps=6),
    ):
        columns = [tap * 4 + channel for tap in range(pairs.taps) for channel in (1, 2)]
        expected = pairs.products(0, 5)[rows][:, columns]
        ways = [pairs.narrowed(rows, channels)]
        if pairs.has_vectors:
            ways.append(Pairs.narrowed(pairs, rows, channels))
        for part in ways:
            assert (part.n_out, part.n_in, part.taps) == (3, 2 * pairs.taps, pairs.taps)
            assert part.samples == pairs.samples and part.is_finite()
            torch.testing.assert_close(part.products(0, 3), expected)
            torch.testing.assert_close(part.products(1, 3), expected[1:])
    shifted = RowPairs(conv, 2, 5).narrowed(torch.tensor([0, 2]), channels)
    same = conv.narrowed(torch.tensor([2, 4]), channels)
    assert torch.equal(shifted.products(0, 2), same.products(0, 2))


def test_few_entries_are_computed_alone_and_many_with_their_tiles(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pairs = LinearPairs(torch.randn(7, 40), torch.randn(7, 30))
    tiles: list[tuple[int, int]] = []
    products = LinearPairs.products
    monkeypatch.setattr(
        LinearPairs,
        "products",
        lambda self, a, b: (tiles.append((a, b)), products(self, a, b))[1],
    )
    monkeypatch.setattr(growth.pairs, "TILE_FLOATS", 8 * 40)
    expected = pairs.dz.T @ pairs.x
    for keys, used in (
        (torch.arange(48) * 25, []),
        (torch.arange(49) * 24, [(0, 8), (8, 16), (16, 24), (24, 30)]),
        (torch.arange(400, 500), [(8, 16)]),
        (torch.empty(0, dtype=torch.int64), []),
    ):
        tiles.clear()
        row, col = keys // 40, keys % 40
        torch.testing.assert_close(pairs.products_at(row, col), expected[row, col])
        assert tiles == used


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


@pytest.mark.parametrize(
    ("floats", "pieces"),
    [
        (1, [7] * 30),  # a row of an example's 6 x 7 positions, each of 8 inputs, is the least
        (250, [28, 14] * 5),  # rows of 56 floats
        (400, [42] * 5),
        (900, [84, 84, 42]),
        (10**9, [210]),
    ],
)
def test_chunks_are_bounded_and_add_up(
    monkeypatch: pytest.MonkeyPatch, floats: int, pieces: list[int]
) -> None:
    pairs = _conv((2, 2), batch=5)
    whole = list(pairs.chunks())
    monkeypatch.setattr(growth.conv_pairs, "CHUNK_FLOATS", floats)
    chunks = list(pairs.chunks())
    assert [x.shape[0] for x, _ in chunks] == pieces
    assert sum(pieces) == pairs.samples
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
    monkeypatch.setattr(growth.conv_pairs, "CHUNK_FLOATS", 1)
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


@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0])
def test_earlier_recordings_decay(decay: float) -> None:
    steps = [_conv((3, 3), size=size, scale=0.5) for size in ((5, 5), (9, 6), (4, 4))]
    joined = JoinedPairs(steps, decay)
    weights = [decay**2, decay, 1.0]
    expected = sum(w * _weight_gradient(step) for w, step in zip(weights, steps, strict=True))
    _check_products(joined, expected)
    of_x, of_dz = joined.squared_norms()
    norms = [step.squared_norms() for step in steps]
    torch.testing.assert_close(of_x, sum(of_x for of_x, _ in norms))
    weighted = sum(w**2 * of_dz for w, (_, of_dz) in zip(weights, norms, strict=True))
    torch.testing.assert_close(of_dz, weighted)


def test_without_decay_nothing_is_copied() -> None:
    one = LinearPairs(torch.ones(2, 3), torch.ones(2, 4))
    for (x, dz), part in zip(JoinedPairs([one, one]).chunks(), (one, one), strict=True):
        assert x.data_ptr() == part.x.data_ptr() and dz.data_ptr() == part.dz.data_ptr()


@pytest.mark.parametrize("decay", [-0.1, 1.1, float("nan")])
def test_decays_that_cannot_be(decay: float) -> None:
    one = LinearPairs(torch.ones(2, 3), torch.ones(2, 4))
    with pytest.raises(InputError, match=r"decay .* must lie in \[0, 1\]"):
        JoinedPairs([one, one], decay)


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


MEMORY = """
import sys, torch
from torch.nn.grad import conv2d_weight
from growth import ConvPairs

def peak():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024

dtype, d = getattr(torch, sys.argv[1]), int(sys.argv[2])
small = torch.ones(2, 4, 6, 6)
conv2d_weight(small, (4, 4, 3, 3), small, 1, 1, 1)  # the library's own start
x, dz = (torch.ones(128, 320, 8, 8, dtype=dtype) for _ in range(2))
pairs = ConvPairs(x, dz, (3, 3), padding=(d, d), dilation=(d, d))
keys = torch.arange(0, 320 * 2880, 400)
before = peak()
if sys.argv[3] == "products":
    pairs.products(0, 320)
else:
    pairs.products_at(keys // 2880, keys % 2880)
    pairs.squared_norms()
    pairs.pooled().products(0, 320)
    for _ in pairs.chunks():
        pass
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
@pytest.mark.parametrize(
    ("dtype", "dilation", "what", "limit"),
    [
        ("float32", 1, "products", 100),
        ("float64", 1, "products", 200),
        ("float16", 2, "products", 150),
        ("float32", 1, "all else", 150),
    ],
)
def test_memory_of_the_largest_layer_of_wrn_28_5(
    dtype: str, dilation: int, what: str, limit: int
) -> None:
    """MB above the recording itself; unfolded whole, its input alone would be 94 or 189 MB."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, dtype, str(dilation), what],
        cwd=Path(__file__).parents[1],
        # What is freed goes back to the system at once: the peak is what is held, not what the
        # allocator happens to keep (107 MB in place of 122 to 151 of "all else").
        env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < limit * 1e6, f"{int(done.stdout) / 1e6:.0f} MB"


@pytest.mark.parametrize("floats", [600, 10**9])
def test_gram_of_a_convolution(monkeypatch: pytest.MonkeyPatch, floats: int) -> None:
    """In pieces of one row of positions, of some examples, or whole."""
    monkeypatch.setattr(growth.conv_pairs, "_CACHED_FLOATS", floats)
    pairs = _conv((2, 3), (2, 1), (1, 2), (1, 2), batch=5, scale=0.5)
    both = torch.cat(pairs.vectors(), dim=1).double()
    torch.testing.assert_close(pairs.gram(), both.T @ both, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(pairs.gram(), Pairs.gram(pairs), rtol=1e-5, atol=1e-5)
