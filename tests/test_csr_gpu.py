"""The unstructured kernels without a GPU: compiled for several, and refused where they cannot run.
Their results are checked in tests/kernels."""

from __future__ import annotations

import re

import pytest
import torch
from ahead_of_time import GPUS, MAIN_GPUS, Compiled, assert_fits, compile_kernel
from torch import Tensor

from triton_kernels import csr_gpu
from triton_kernels.require import interpreting

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
KERNELS = ("product", "weight_gradient")
OTHER_GPUS = [gpu for gpu in GPUS if gpu not in MAIN_GPUS]


def compile_csr(
    kernel: str, gpu: str, dtype: str, batch: int = 1024, metadata: str = "i32"
) -> Compiled:
    """With the types and the constants with which the launchers launch it."""
    pytest.importorskip("triton", reason="triton is not installed")
    from triton_kernels import csr_kernel

    launch = csr_gpu.choose_launch(kernel, batch, DTYPES[dtype])
    pointers = {"x_ptr": f"*{dtype}", "offsets_ptr": f"*{metadata}", "slots_ptr": f"*{metadata}"}
    integers = {"batch": "i32", "rows": "i32"}
    if kernel == "product":
        function = csr_kernel.csr_product_kernel
        pointers |= {"values_ptr": f"*{dtype}", "index_ptr": f"*{metadata}", "y_ptr": f"*{dtype}"}
    else:
        function = csr_kernel.csr_weight_gradient_kernel
        pointers |= {"dy_ptr": f"*{dtype}", "cols_ptr": f"*{metadata}", "grad_ptr": f"*{dtype}"}
        integers |= {"parts": "i32"}
    return compile_kernel(
        function,
        gpu,
        {**pointers, **integers, "TILE": launch.tile, "STEP": launch.step},
        multiples_of_16=("batch",),
        num_warps=launch.num_warps,
        enable_fp_fusion=True,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("gpu", MAIN_GPUS)
def test_compiles_without_spills(gpu: str, kernel: str, dtype: str) -> None:
    compiled = compile_csr(kernel, gpu, dtype)
    assert_fits(compiled, gpu)
    # 16 bytes of activations a lane.
    wide = r"ld\.global\S*\.v4\.b32" if gpu.startswith("sm_") else r"(buffer|global)_load_dwordx4"
    assert re.search(wide, compiled.assembly)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("gpu", OTHER_GPUS)
def test_compiles_for_other_gpus(gpu: str, kernel: str, dtype: str) -> None:
    assert_fits(compile_csr(kernel, gpu, dtype), gpu)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [16, 48, 128])
@pytest.mark.parametrize("metadata", ["i32", "i64"])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("gpu", MAIN_GPUS)
def test_every_tile_compiles(gpu: str, kernel: str, metadata: str, batch: int) -> None:
    for dtype in ("fp32", "bf16"):
        assert_fits(compile_csr(kernel, gpu, dtype, batch, metadata), gpu)


def empty() -> Tensor:
    return torch.empty(0, dtype=torch.int32)


def test_what_is_refused() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    x, values = torch.ones(2, 3), torch.ones(4, 1, 1)
    offsets = torch.zeros(6, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"\(3,\) must be \(batch, features\)"):
        csr_gpu.product(x[0], values, offsets, empty(), empty(), 5)
    with pytest.raises(ValueError, match=r"not torch\.float64 and torch\.float64"):
        csr_gpu.product(x.double(), values.double(), offsets, empty(), empty(), 5)
    with pytest.raises(ValueError, match=r"not torch\.float16 and torch\.float32"):
        csr_gpu.product(x.half(), values, offsets, empty(), empty(), 5)
    if interpreting():
        pytest.skip("TRITON_INTERPRET is set: kernels run on the CPU")
    with pytest.raises(ValueError, match=r"tensors on cpu and cpu .* move them to one GPU"):
        csr_gpu.product(x, values, offsets, empty(), empty(), 5)
    with pytest.raises(ValueError, match=r"tensors on cpu and cpu .* move them to one GPU"):
        csr_gpu.weight_gradient(x, x, offsets[:4], empty(), empty(), 5)
