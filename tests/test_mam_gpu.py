"""The kernels of multiply-and-max/min without a GPU: compiled for several, and refused where they
cannot run. Their results are checked in tests/kernels."""

from __future__ import annotations

import re
from functools import partial

import pytest
import torch
from ahead_of_time import GPUS, MAIN_GPUS, Compiled, assert_fits, compile_kernel

from triton_kernels import mam_gpu, mam_scatter
from triton_kernels.layout import Layout
from triton_kernels.require import interpreting

DTYPES = ("fp32", "fp16", "bf16")
OTHER_GPUS = [gpu for gpu in GPUS if gpu not in MAIN_GPUS]


def compile_search(gpu: str, dtype: str, n_in: int = 1024) -> Compiled:
    """dtype: of the products: float32 for all that is not packed."""
    pytest.importorskip("triton", reason="triton is not installed")
    from triton_kernels.mam_kernel import search_kernel

    launch = mam_gpu.choose_launch(n_in)
    return compile_kernel(
        search_kernel,
        gpu,
        {
            **dict.fromkeys(("x_ptr", "w_ptr"), f"*{dtype}"),
            **dict.fromkeys(("high_ptr", "low_ptr"), "*fp32"),
            "tiles_ptr": "*i32",
            **dict.fromkeys(("batch", "n_out", "depth", "share"), "i32"),
            **dict.fromkeys(("x_stride", "w_stride"), "i32"),
            "SAMPLES": launch.samples,
            "OUTPUTS": launch.outputs,
            "DEPTH": launch.depth,
            "UNROLL": launch.unroll,
        },
        multiples_of_16=("x_stride", "w_stride", "n_out"),
        num_warps=launch.num_warps,
        num_stages=1,
        enable_fp_fusion=True,
    )


def compile_winners(
    gpu: str, dtype: str, n_in: int = 1024, packed: bool = False, count: bool = False
) -> Compiled:
    pytest.importorskip("triton", reason="triton is not installed")
    from triton_kernels.mam_kernel import winners_kernel

    outputs, num_warps = mam_gpu.SECOND_PASS
    return compile_kernel(
        winners_kernel,
        gpu,
        {
            **dict.fromkeys(("x_ptr", "w_ptr", "values_ptr"), f"*{dtype}"),
            **dict.fromkeys(("high_ptr", "low_ptr"), "*fp32"),
            **dict.fromkeys(("tiles_ptr", "arg_max_ptr", "arg_min_ptr", "counts_ptr"), "*i32"),
            **dict.fromkeys(("batch", "n_out", "n_in", "shares"), "i32"),
            "OUTPUTS": outputs,
            "DEPTH": mam_gpu.choose_launch(n_in).depth,
            "PACKED": packed,
            "COUNT": count,
        },
        multiples_of_16=("n_out", "n_in"),
        num_warps=num_warps,
        enable_fp_fusion=True,
    )


def compile_scatter(
    gpu: str, dtype: str, what: str, to_weight: bool = True, sparse: bool = False
) -> Compiled:
    pytest.importorskip("triton", reason="triton is not installed")
    from triton_kernels.mam_kernel import scatter_kernel

    metadata = ("arg_max_ptr", "arg_min_ptr", "cols_ptr", "slots_ptr")
    return compile_kernel(
        scatter_kernel,
        gpu,
        {
            **dict.fromkeys(("dy_ptr", "other_ptr"), f"*{dtype}"),
            **dict.fromkeys((*metadata, "largest_ptr"), "*i32"),
            "sums_ptr": "*i64" if what in ("largest", "whole") else "*fp32",
            "rest_ptr": "*fp32",
            **dict.fromkeys(("n_out", "n_in", "dy_stride", "arg_stride", "bits"), "i32"),
            "TO_WEIGHT": to_weight,
            "SPARSE": sparse,
            "LARGEST": what == "largest",
            "WHOLE": what == "whole",
            "TILE": mam_scatter.TILE,
        },
        multiples_of_16=("n_out", "n_in", "dy_stride", "arg_stride"),
        num_warps=mam_scatter.WARPS,
        enable_fp_fusion=True,
    )


def compile_sparse(
    gpu: str, dtype: str, absent: bool = True, count: bool = False, metadata: str = "i32"
) -> Compiled:
    pytest.importorskip("triton", reason="triton is not installed")
    from triton_kernels.mam_sparse_kernel import sparse_winners_kernel

    tile, step, num_warps = mam_gpu.SPARSE
    return compile_kernel(
        sparse_winners_kernel,
        gpu,
        {
            **dict.fromkeys(("x_ptr", "values_ptr", "y_ptr"), f"*{dtype}"),
            **dict.fromkeys(("offsets_ptr", "cols_ptr", "slots_ptr"), f"*{metadata}"),
            **dict.fromkeys(("arg_max_ptr", "arg_min_ptr", "counts_ptr"), "*i32"),
            **dict.fromkeys(("samples", "batch", "rows", "n_in"), "i32"),
            "TILE": tile,
            "STEP": step,
            "ABSENT": absent,
            "COUNT": count,
        },
        multiples_of_16=("batch",),
        num_warps=num_warps,
        enable_fp_fusion=True,
    )


OTHER_KERNELS = {
    "winners": compile_winners,
    "scatter": partial(compile_scatter, what="whole"),
    "sparse": compile_sparse,
}


def assert_straight(compiled: Compiled, gpu: str) -> None:
    """In the loop over the inputs, nothing goes through shared memory, and every operand is loaded
    once: 4 samples, and 4 outputs together, for the 16 products of a thread."""
    assert_fits(compiled, gpu)
    if gpu.startswith("sm_"):
        blocks = re.split(r"\n(?=\$L__BB)", compiled.assembly)
        (loop,) = (block for block in blocks if re.search(r"\bmax\.", block))
        assert 0 < loop.count("ld.global") <= 5 * mam_gpu.choose_launch(1024).unroll
        assert not re.search(r"bar\.sync|shared", loop)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gpu", MAIN_GPUS)
def test_the_search_compiles_without_spills(gpu: str, dtype: str) -> None:
    assert_straight(compile_search(gpu, dtype), gpu)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", OTHER_KERNELS)
@pytest.mark.parametrize("gpu", MAIN_GPUS)
def test_the_others_compile_without_spills(gpu: str, kernel: str, dtype: str) -> None:
    assert_fits(OTHER_KERNELS[kernel](gpu, dtype), gpu)


def test_exact_products_take_three_instructions() -> None:
    """A product, a maximum and a minimum, and NaN costs nothing, from sm_80 on."""
    loop = compile_search("sm_90", "fp32").assembly
    turns = 16 * mam_gpu.choose_launch(1024).unroll
    for instruction in ("mul.f32", "max.NaN.f32", "min.NaN.f32"):
        assert loop.count(instruction) == turns, instruction
    assert "cvt.rn.bf16" not in loop


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gpu", OTHER_GPUS)
def test_compiles_for_other_gpus(gpu: str, dtype: str) -> None:
    assert_straight(compile_search(gpu, dtype), gpu)
    for kernel in OTHER_KERNELS.values():
        assert_fits(kernel(gpu, dtype), gpu)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gpu", MAIN_GPUS)
def test_every_option_compiles(gpu: str, dtype: str) -> None:
    """Deep tiles, packed products, counts, absent weights left out, wide metadata, and every pass
    of the gradients."""
    assert_straight(compile_search(gpu, dtype, 4096), gpu)
    compiled = [
        compile_winners(gpu, dtype, 4096),
        compile_winners(gpu, dtype, 4096, count=True),
        compile_sparse(gpu, dtype, absent=False),
        compile_sparse(gpu, dtype, count=True),
        compile_sparse(gpu, dtype, metadata="i64"),
    ]
    if dtype != "fp32":
        compiled += [compile_winners(gpu, dtype, packed=True)]
    for what in ("sums", "largest", "whole"):
        for to_weight in (True, False):
            for sparse in (True, False):
                compiled += [compile_scatter(gpu, dtype, what, to_weight, sparse)]
    for one in compiled:
        assert_fits(one, gpu)


def test_what_cannot_run_is_refused() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    x, weight = torch.ones(4, 6), torch.ones(5, 6)
    with pytest.raises(ValueError, match=r"x \(6,\) and weight \(5, 6\) must be \(batch, n_in\)"):
        mam_gpu.winners(x[0], weight)
    with pytest.raises(ValueError, match=r"\(4, 0\) .* over the same inputs, at least one"):
        mam_gpu.winners(x[:, :0], weight[:, :0])
    with pytest.raises(ValueError, match=r"not torch\.float64 and torch\.float64"):
        mam_gpu.winners(x.double(), weight.double())
    with pytest.raises(ValueError, match=r"not torch\.float16 and torch\.float32"):
        mam_gpu.winners(x.half(), weight)
    with pytest.raises(ValueError, match=r"packed .* not torch\.float32: leave packed out"):
        mam_gpu.winners(x, weight, packed=True)
    wide = torch.ones(1, 1).expand(1, mam_gpu.MOST_TILES * 64 + 1)
    with pytest.raises(ValueError, match=r"4194305 inputs are too many .* at most 4194304"):
        mam_gpu.winners(wide, wide)
    empty = torch.zeros(0, dtype=torch.int32)
    offsets = torch.zeros(6, dtype=torch.int32)
    layout = Layout(offsets, empty, empty, offsets, empty, empty, n_out=5, taps=1, channels=6)
    values = torch.ones(3, 1, 1)
    with pytest.raises(ValueError, match=r"absent 'one' is not known: .* 'zero'"):
        mam_gpu.sparse_winners(x, values, layout, absent="one")
    with pytest.raises(ValueError, match=r"x \(4, 5\) must be \(batch, 6\)"):
        mam_gpu.sparse_winners(x[:, :5], values, layout)
    if interpreting():
        pytest.skip("TRITON_INTERPRET is set: kernels run on the CPU")
    args = torch.zeros(4, 5, dtype=torch.int32), torch.zeros(4, 5, dtype=torch.int32)
    dy = torch.ones(4, 5)
    for call in (
        lambda: mam_gpu.winners(x, weight),
        lambda: mam_gpu.count_selections(x, weight, weight.int()),
        lambda: mam_gpu.input_gradient(dy, weight, *args),
        lambda: mam_gpu.weight_gradient(dy, x, *args),
        lambda: mam_gpu.sparse_winners(x, values, layout),
        lambda: mam_gpu.sparse_input_gradient(dy, values, layout, *args),
        lambda: mam_gpu.sparse_weight_gradient(dy, x, layout, *args, 3),
    ):
        with pytest.raises(ValueError, match=r"tensors on cpu and cpu .* move them to one GPU"):
            call()
