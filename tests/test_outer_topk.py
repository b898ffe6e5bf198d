"""The search kernel without a GPU: compiled for several, and refused where it cannot run. Its
results are checked in tests/kernels."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ahead_of_time import GPUS, MAIN_GPUS, Compiled, assert_fits, compile_kernel, version

ROOT = Path(__file__).resolve().parent.parent
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SIDES = (16, 32, 64, 128)
OTHER_BLOCKS = [(bh, bw) for bh in SIDES for bw in SIDES if (bh, bw) != (16, 16)]
OTHER_GPUS = [gpu for gpu in GPUS if gpu not in MAIN_GPUS]


def compile_search(gpu: str, dtype: str, block: tuple[int, int], absolute: bool = True) -> Compiled:
    """With the types and the constants with which ``search`` launches it."""
    triton = pytest.importorskip("triton", reason="triton is not installed")
    from triton_kernels.outer_topk import choose_config
    from triton_kernels.outer_topk_kernel import outer_topk_kernel

    if gpu == "sm_100" and dtype != "fp32" and version(triton) < (3, 8):
        pytest.skip("Triton before 3.8 fails in its own layouts of Blackwell's tensor memory")
    config = choose_config(block, DTYPES[dtype])
    arguments: dict[str, str | int] = {
        "dz_ptr": f"*{dtype}",
        "x_ptr": f"*{dtype}",
        "row_ptr": "*i32",
        "col_ptr": "*i32",
        "order_ptr": "*i32",
        "threshold_ptr": "*fp32",
        "last_ptr": "*i32",
        "counter_ptr": "*i64",
        "place_ptr": "*i64",
        "score_ptr": "*fp32",
        "start": "i32",
        "room": "i32",
        "depth": "i32",
        "dz_stride": "i32",
        "x_stride": "i32",
        "col_tiles": "i32",
        "TILE": config.tile,
        "STEP": config.step,
        "BLOCK_ROWS": block[0],
        "BLOCK_COLS": block[1],
        "ABSOLUTE": absolute,
    }
    return compile_kernel(
        outer_topk_kernel,
        gpu,
        arguments,
        multiples_of_16=("depth", "dz_stride", "x_stride"),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=True,
    )


@pytest.mark.parametrize("block", [(1, 1), (16, 16)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gpu", MAIN_GPUS)
def test_compiles_without_spills(gpu: str, dtype: str, block: tuple[int, int]) -> None:
    compiled = compile_search(gpu, dtype, block)
    assert_fits(compiled, gpu)
    if gpu == "sm_90" and dtype != "fp32":
        assert "wgmma" in compiled.assembly
    if gpu.startswith("sm_"):
        # Full float32 precision: PTX names tf32 where it is used.
        assert "tf32" not in compiled.assembly


@pytest.mark.slow
@pytest.mark.parametrize("block", OTHER_BLOCKS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("gpu", MAIN_GPUS)
def test_every_block_compiles(gpu: str, dtype: str, block: tuple[int, int]) -> None:
    assert_fits(compile_search(gpu, dtype, block), gpu)


@pytest.mark.slow
@pytest.mark.parametrize("block", [(1, 1), (16, 16), (128, 128)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gpu", OTHER_GPUS)
def test_compiles_for_other_gpus(gpu: str, dtype: str, block: tuple[int, int]) -> None:
    assert_fits(compile_search(gpu, dtype, block), gpu)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gpu", list(GPUS))
def test_signed_scores_compile(gpu: str, dtype: str) -> None:
    assert_fits(compile_search(gpu, dtype, (1, 1), absolute=False), gpu)


def test_the_cpu_is_refused() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    from triton_kernels.outer_topk import outer_topk
    from triton_kernels.require import interpreting

    if interpreting():
        pytest.skip("TRITON_INTERPRET is set: kernels run on the CPU")
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"tensors on cpu .* move them to a GPU"):
        outer_topk(x, x, 1, torch.empty(0, dtype=torch.int64))


def last_line(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 1
    return done.stderr.strip().splitlines()[-1]


def test_missing_triton_is_one_line() -> None:
    code = (
        "import sys, torch; sys.modules['triton'] = None; from triton_kernels import outer_topk\n"
        "assert outer_topk.supports((16, 16)) and not outer_topk.supports((1, 16))\n"
        "x = torch.ones(2, 3); outer_topk.outer_topk(x, x, 1, torch.empty(0, dtype=torch.int64))"
    )
    assert last_line(code) == (
        "ImportError: the search for connections on a GPU needs the library triton, which is not "
        "installed: pip install 'sparsegrow[gpu]'"
    )


def test_another_triton_is_refused(tmp_path: Path) -> None:
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").touch()
    path = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
    said = last_line(
        f"{path}from triton_kernels.require import require_triton; require_triton('this')"
    )
    assert said.startswith(f"ImportError: this: the package triton at {tmp_path}/triton is another")


def test_another_triton_kernels_is_refused() -> None:
    code = (
        "import triton_kernels; del triton_kernels.sparse_linear\n"
        "from triton_kernels.require import require_triton; require_triton('this')"
    )
    assert "ImportError: this: the package triton_kernels at " in last_line(code)
