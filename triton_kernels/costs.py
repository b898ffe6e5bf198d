"""The one cost model: which way to compute a product is the cheapest."""

from __future__ import annotations

from typing import NamedTuple

# A dense weight above this is never scattered: the memory is the point of being sparse.
LARGEST_SCATTER_BYTES = 1 << 30

COMPUTE = ("auto", "dense", "sparse")


class Layer(NamedTuple):
    """A sparse layer and the input of one step.

    n_out, n_in: of the weight, n_in being taps * channels. alive: blocks. rows: of the product,
    batch x positions. padded: the same with the positions that the sparse product of a convolution
    computes and drops. itemsize: bytes of a weight. device: its type.
    """

    n_out: int
    n_in: int
    taps: int
    block: tuple[int, int]
    alive: int
    rows: int
    padded: int
    itemsize: int
    device: str

    @property
    def size(self) -> int:
        """Blocks, if all were alive."""
        across = self.taps * -(-self.n_in // self.taps // self.block[1])
        return -(-self.n_out // self.block[0]) * across


# One training step (forward and both gradients) on the CPU, in nanoseconds of the machine that
# benchmarks/block_sparse.py measured; only ratios matter. What each counts: see the ``_parts``.
NS_DENSE, NS_DENSE_CONV = (0.0046, 8.8, 40.0), (0.0073, 20.0, 40.0)
# By the smaller side of a block; 1: single weights. That of 2 was not measured.
NS_SPARSE = {
    1: (0.026, 15.0, 9.0),
    2: (0.6, 300.0, 7.0),
    4: (0.17, 300.0, 7.0),
    8: (0.064, 300.0, 5.5),
    16: (0.0145, 300.0, 5.5),
    32: (0.0105, 120.0, 4.8),
    64: (0.0077, 300.0, 5.3),
    128: (0.0071, 300.0, 5.6),
}
# Rows that the products of blocks take at a time (``blocks_cpu``, ``conv_cpu``).
ROWS_AT_ONCE = 512
# On a GPU, by the smaller side of a block: half of the density at which the rooflines of an H200 in
# half precision meet, because nothing was measured on one yet.
CUDA_BREAK_EVEN = {1: 0.005, 16: 0.055, 32: 0.1, 64: 0.17, 128: 0.25}


def choose(layer: Layer) -> str:
    """``sparse`` or ``dense``: the faster way to compute a training step of this layer."""
    if layer.n_out * layer.n_in * layer.itemsize > LARGEST_SCATTER_BYTES:
        return "sparse"
    if layer.device != "cpu":
        # Where there is no kernel: as little as that of single weights.
        side = max(s for s in CUDA_BREAK_EVEN if s <= min(layer.block))
        return "sparse" if layer.alive <= CUDA_BREAK_EVEN[side] * layer.size else "dense"
    return "sparse" if sparse_step_ns(layer) < dense_step_ns(layer) else "dense"


def break_even(layer: Layer) -> float:
    """The highest density at which ``choose`` says ``sparse``; 0 where there is none."""
    low, high = 0, layer.size
    while low < high:
        middle = (low + high + 1) // 2
        if choose(layer._replace(alive=middle)) == "sparse":
            low = middle
        else:
            high = middle - 1
    return low / layer.size


def dense_step_ns(layer: Layer) -> float:
    """Time of a training step through a scattered weight on the CPU."""
    return _sum(dense_parts(layer), NS_DENSE if layer.taps == 1 else NS_DENSE_CONV)


def dense_parts(layer: Layer) -> tuple[float, ...]:
    """FLOPs of the dense products; entries of the weight, written and read; single weights, which
    are scattered and gathered one by one."""
    entries = layer.n_out * layer.n_in
    singles = layer.alive if layer.block == (1, 1) else 0
    return 6.0 * layer.rows * entries, float(entries), float(singles)


def sparse_step_ns(layer: Layer) -> float:
    """Time of a training step that never forms the weight, on the CPU."""
    if layer.block == (1, 1) and layer.taps > 1:
        return float("inf")  # there is no such product
    # Blocks of one row or column are no single weights.
    least = 1 if layer.block == (1, 1) else max(2, min(layer.block))
    side = max(size for size in NS_SPARSE if size <= least)
    return _sum(sparse_parts(layer), NS_SPARSE[side])


def sparse_parts(layer: Layer) -> tuple[float, ...]:
    """FLOPs of the alive blocks; blocks, once for every piece of the batch; entries of the
    activations, which are copied to where blocks find them, and back."""
    bh, bw = layer.block
    pieces = -(-layer.padded // ROWS_AT_ONCE)
    copied = layer.padded * (layer.n_in // layer.taps + layer.n_out)
    return (
        6.0 * layer.alive * bh * bw * layer.padded,
        float(layer.alive * pieces),
        float(copied),
    )


def _sum(parts: tuple[float, ...], each: tuple[float, ...]) -> float:
    return sum(count * ns for count, ns in zip(parts, each, strict=True))


# The searches of growth, in nanoseconds on one core, from benchmarks/growth.py. They choose between
# ways to the same result, so that only their ratios matter.
NS_PER_FLOP = 0.0083  # of a product of large tiles
NS_PER_SCORE = 0.5  # to compare an entry of a tile with the threshold
NS_PER_CANDIDATE = 250.0  # to hold, sort and merge what reached it
NS_PER_RESCORED, NS_PER_RESCORED_FLOP = 4.0, 0.77  # a single entry, by its two vectors
NS_PER_SORTED = 180.0  # a vector, by its norm
NS_OF_DECOMPOSITION = 6e6
# A bitmap of active connections, per bit and per active one; a search among sorted keys.
NS_PER_BIT, NS_PER_SET_BIT, NS_PER_LOOKUP = 0.1, 9.0, 110.0
# Beyond it the search's own memory would no longer be small.
LARGEST_BITMAP_BYTES = 16 << 20
# From this many pairs on, what spares products costs less than it saves.
LEAST_SCANNED_PAIRS = 1 << 19
# Candidates are rescored one by one: above this share of all pairs, tiles are the cheaper.
LARGEST_RESCORED_SHARE = 0.04
# A FLOP through Gram matrices costs this many in a plain tile, packing and rescoring included.
GRAM_OVERHEAD = 3.0
# Gram matrices, all held at once, take no more floats than this, or than half of what G would.
LARGEST_GRAM_FLOATS = 8 << 20


def active_bitmap_pays(active: int, size: int, questions: int) -> bool:
    """Whether a bitmap of ``size`` connections costs less than ``questions`` binary searches."""
    build = NS_PER_BIT * size + NS_PER_SET_BIT * active
    return active > 0 and size // 8 <= LARGEST_BITMAP_BYTES and build < NS_PER_LOOKUP * questions


def longer_than_wide(n_out: int, n_in: int, samples: int) -> bool:
    """Whether a copy of the vectors would take more than half of what G does."""
    return 2 * samples * (n_out + n_in) > n_out * n_in


def scan_pays(n_out: int, n_in: int, samples: int) -> bool:
    """Whether vectors are searched in the order of their norms, which needs a sorted copy."""
    long = longer_than_wide(n_out, n_in, samples)
    return n_out * n_in >= LEAST_SCANNED_PAIRS and not long


def scan_ns(n_out: int, n_in: int, depth: int, computed: float, found: int) -> float:
    """Time of a norm-ordered scan of vectors of ``depth`` that computes this share of all pairs."""
    per_pair = 2 * depth * NS_PER_FLOP + NS_PER_SCORE
    return (
        computed * n_out * n_in * per_pair
        + found * NS_PER_CANDIDATE
        + (n_out + n_in) * (NS_PER_SORTED + depth)
    )


def lowrank_pays(n_out: int, n_in: int, samples: int, rank: int, candidates: int) -> bool:
    """Whether a screen in ``rank`` dimensions may cost less than the products themselves."""
    few = candidates <= LARGEST_RESCORED_SHARE * n_out * n_in
    return scan_pays(n_out, n_in, samples) and few and samples >= 2 * rank


def lowrank_ns(
    n_out: int, n_in: int, samples: int, rank: int, checked: int, rescored: int
) -> float:
    """Time of a low-rank search beside its scan. checked: entries that are computed as a sample;
    rescored: candidates."""
    decomposed = 2 * samples * (samples + rank) * (n_out + n_in) * NS_PER_FLOP
    sampled = checked * (2 * (samples + 2 * rank) * NS_PER_FLOP + 10 * NS_PER_SCORE)
    exact = rescored * (NS_PER_RESCORED + samples * NS_PER_RESCORED_FLOP)
    return NS_OF_DECOMPOSITION + decomposed + sampled + exact


def gram_pays(n_out: int, n_in: int, samples: int, block: tuple[int, int]) -> bool:
    """Whether the norms of blocks are cheaper by Gram matrices than by their products, and these
    matrices not too large to hold."""
    held = samples * (samples + 1) // 2 * -(-n_in // block[1])
    large = held > max(LARGEST_GRAM_FLOATS, n_out * n_in // 2)
    if large or n_out * n_in < LEAST_SCANNED_PAIRS:
        return False
    return gram_ns(n_out, n_in, samples, block) < tiles_ns(n_out, n_in, samples)


def tiles_ns(n_out: int, n_in: int, samples: int) -> float:
    """Time of all entries and their comparison, or their sums over blocks."""
    return n_out * n_in * (2 * samples * NS_PER_FLOP + 2 * NS_PER_SCORE)


def gram_ns(n_out: int, n_in: int, depth: int, block: tuple[int, int]) -> float:
    """Time of all blocks by the Gram matrices of vectors of ``depth``."""
    blocks = (n_out / block[0]) * (n_in / block[1])
    flops = 2 * depth * depth * (n_out + n_in) + depth * depth * blocks
    return GRAM_OVERHEAD * flops * NS_PER_FLOP + blocks * NS_PER_SCORE
