"""The one cost model: which way to compute a product is the cheapest."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple, ParamSpec, TypeVar

import torch

from triton_kernels import constants

# A dense weight above this is never scattered: the memory is the point of being sparse.
LARGEST_SCATTER_BYTES = 1 << 30

COMPUTE = ("auto", "dense", "sparse")

P = ParamSpec("P")
T = TypeVar("T")


class Layer(NamedTuple):
    """A sparse layer and the input of one step.

    n_out, n_in: of the weight, n_in being taps * channels. alive: blocks. rows: of the product,
    batch x positions. padded: the same with the positions that the sparse product of a convolution
    computes and drops. itemsize: bytes of a weight in the product. device: its type. pointwise: a
    convolution of one tap.
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
    pointwise: bool = False

    @property
    def is_convolution(self) -> bool:
        return self.taps > 1 or self.pointwise

    @property
    def size(self) -> int:
        """Blocks, if all were alive."""
        across = self.taps * -(-self.n_in // self.taps // self.block[1])
        return -(-self.n_out // self.block[0]) * across


class Work(NamedTuple):
    """What a training step (forward and both gradients) does on the CPU. form: who does it, one of
    ``constants``; side: the smaller one of its blocks. parts: what is counted, in the order of its
    nanoseconds each."""

    form: str
    side: int
    parts: tuple[float, ...]


# What is larger leaves the caches between one product and the next.
CACHED_BYTES = 16 << 20
# A scattered weight in strips, by which loops multiply.
LOOPS = "scattered_loops linear"
# What an item of so many bytes is taken for.
_DTYPES = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}


def choose(layer: Layer) -> str:
    """``sparse`` or ``dense``: the faster way to compute a training step of this layer."""
    if layer.n_out * layer.n_in * layer.itemsize > LARGEST_SCATTER_BYTES:
        return "sparse"
    if layer.device != "cpu":
        most = _gpu_break_even(min(layer.block)) * layer.size
        return "sparse" if layer.alive <= most else "dense"
    # What lies dense costs what a dense layer does.
    sparse = not _lies_dense(layer) and sparse_step_ns(layer) < dense_step_ns(layer)
    return "sparse" if sparse else "dense"


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
    return _step_ns(layer, [dense_work(layer)])


def sparse_step_ns(layer: Layer) -> float:
    """Time of a training step that never forms the weight, on the CPU; infinite where there is no
    such product."""
    works = sparse_work(layer)
    return _step_ns(layer, works) if works else float("inf")


def dense_work(layer: Layer) -> Work:
    """The cheapest of ``dense_works``, as far as their times are known."""
    best, *others = dense_works(layer)
    # Not ``min``, which not every version of ``torch.compile`` can trace with a key.
    for work in others:
        if _known(work.form) and _ns(work) < _ns(best):
            best = work
    return best


def dense_works(layer: Layer) -> list[Work]:
    """One for each way that there is; the same counts for all. FLOPs of the dense products; entries
    of the weight, written and read, and those beyond what a cache holds; single weights, which are
    scattered and gathered one by one; the step itself."""
    entries = layer.n_out * layer.n_in
    beyond = max(0, entries - CACHED_BYTES // layer.itemsize)
    singles = layer.alive if layer.block == (1, 1) else 0
    shape = layer.n_out, layer.n_in
    forms = _dense_forms(shape, layer.block, layer.is_convolution, layer.itemsize)
    moved = float(entries), float(beyond), float(singles)
    if _lies_dense(layer):
        forms, moved = forms[:1], (0.0, 0.0, 0.0)
    return [Work(form, 1, (6.0 * layer.rows * entries, *moved, 1.0)) for form in forms]


def _lies_dense(layer: Layer) -> bool:
    """Whether single weights, all alive, are multiplied by as they lie."""
    entries = layer.n_out * layer.n_in
    if layer.block != (1, 1) or layer.alive != entries or layer.is_convolution:
        return False
    form, *_ = _dense_forms((layer.n_out, layer.n_in), (1, 1), False, layer.itemsize)
    return form.startswith("scattered_cpu")


def sparse_work(layer: Layer) -> list[Work]:
    """FLOPs of the alive blocks; their number; entries of the activations; the step itself. Then
    what half precision adds, which is computed in single: entries that are converted. Nothing
    where the weight is scattered in any case."""
    bh, bw = layer.block
    form = _sparse_form(layer.is_convolution, bh, bw, layer.itemsize)
    if not form:
        return []
    # Of the input and of the output.
    activations = layer.padded * (layer.n_in // layer.taps + layer.n_out)
    weights = layer.alive * bh * bw
    # Small blocks may be computed as single weights.
    single = form.startswith("csr")
    alive = weights if single else layer.alive
    parts = 6.0 * weights * layer.padded, float(alive), float(activations), 1.0
    works = [Work(form, 1 if single else min(bh, bw), parts)]
    if layer.itemsize == 2:
        works.append(Work(f"{form} half", 1, (3.0 * (weights + activations),)))
    return works


def ns_of(works: list[Work], known: Mapping[str, constants.Sides]) -> float:
    """Time of all of them, by what is known of each form."""
    return sum(_sum(parts, _nearest(known[form], side)) for form, side, parts in works)


def _step_ns(layer: Layer, works: list[Work]) -> float:
    ns = sum(_ns(work) for work in works)
    # Double precision fills half as many numbers into a vector, and twice the memory.
    return 2 * ns if layer.itemsize == 8 else ns


def _ns(work: Work) -> float:
    return _sum(work.parts, _each(work.form, work.side))


def _sum(parts: tuple[float, ...], each: tuple[float, ...]) -> float:
    return sum(count * ns for count, ns in zip(parts, each, strict=True))


def _nearest(sides: constants.Sides, side: int) -> tuple[float, ...]:
    """Of the largest that is not above this one."""
    return sides[max((s for s in sides if s <= side), default=min(sides))]


def _constant(function: Callable[P, T]) -> Callable[P, T]:
    """For what depends on the machine and not on the batch: ``torch.compile`` does not look inside.
    ``torch.compiler.assume_constant_result`` does the same, but first imports the compiler."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@_constant
def _dense_forms(
    shape: tuple[int, int], block: tuple[int, int], convolution: bool, itemsize: int
) -> list[str]:
    from triton_kernels import scatter_cpu, strips_cpu

    values = torch.empty(0, *block, dtype=_DTYPES[itemsize], device="cpu")
    own = scatter_cpu.available(values, math.prod(shape))
    form = "scattered_cpu" if own else "scattered"
    form += " conv" if convolution else " linear"
    if own and not convolution and strips_cpu.available(values, *shape):
        return [form, LOOPS]
    # Whether a machine multiplies half precision as it is makes all the difference.
    return [form + " half" if itemsize == 2 else form]


@_constant
def _sparse_form(convolution: bool, bh: int, bw: int, itemsize: int) -> str:
    """Its name, or nothing."""
    from triton_kernels.forms import conv_form, linear_form

    x = torch.empty(0, dtype=_DTYPES[itemsize])
    form = conv_form(x, (bh, bw)) if convolution else linear_form(x, (bh, bw))
    return form.name if form else ""


@_constant
def _known(form: str) -> bool:
    return form in constants.on_cpu().ns


@_constant
def _each(form: str, side: int) -> tuple[float, ...]:
    return _nearest(constants.on_cpu().ns[form], side)


@_constant
def _gpu_break_even(side: int) -> float:
    """Where there is no kernel: as little as that of single weights."""
    known = constants.on_gpu().break_even
    return known[max(s for s in known if s <= side)]


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
