"""The block-sparse kernels without a GPU: compiled for several, cut by heuristics or a table, and
refused where they cannot run. Their results are checked in tests/kernels."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ahead_of_time import GPUS, MAIN_GPUS, Compiled, assert_fits, compile_kernel, version

from triton_kernels import block_sparse, tuning
from triton_kernels.tuning import Launch

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ("forward", "input_gradient", "weight_gradient")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
BLOCKS = [(bh, bw) for bh in block_sparse.SIDES for bw in block_sparse.SIDES]
OTHER_GPUS = [gpu for gpu in GPUS if gpu not in MAIN_GPUS]
CPU = torch.device("cpu")


def compile_block_sparse(
    kernel: str,
    gpu: str,
    dtype: str,
    block: tuple[int, int],
    batch: int = 4096,
    tf32: bool = False,
) -> Compiled:
    """With the types and the constants with which ``block_sparse`` launches it, and every option on
    that costs registers."""
    triton = pytest.importorskip("triton", reason="triton is not installed")
    from triton_kernels.block_sparse_kernel import product_kernel, weight_gradient_kernel

    if gpu == "sm_100" and dtype != "fp32" and version(triton) < (3, 8):
        pytest.skip("Triton before 3.8 fails in its own layouts of Blackwell's tensor memory")
    chosen = tuning.heuristic(kernel, block, DTYPES[dtype], batch, GPUS[gpu][3])
    bh, bw = block
    arguments: dict[str, str | int] = {
        "x_ptr": f"*{dtype}",
        "offsets_ptr": "*i32",
        "slots_ptr": "*i32",
        "batch": "i32",
        "n_in": "i32",
        "n_out": "i32",
        "n_rows": "i32",
        "x_stride": "i32",
        "TILE_M": chosen.tile_m,
        "TF32": tf32,
    }
    if kernel == "weight_gradient":
        function = weight_gradient_kernel
        arguments |= {
            "dy_ptr": f"*{dtype}",
            "cols_ptr": "*i32",
            "grad_ptr": f"*{dtype}",
            "share": "i32",
            "search_steps": "i32",
            "dy_stride": "i32",
            "grad_stride": "i64",
            "GROUP": chosen.tile_k // bw,
            "BH": bh,
            "BW": bw,
        }
    else:
        function, transposed = product_kernel, kernel == "input_gradient"
        arguments |= {
            "values_ptr": f"*{dtype}",
            "index_ptr": "*i32",
            "order_ptr": "*i32",
            "bias_ptr": f"*{dtype}",
            "y_ptr": f"*{dtype}",
            "y_stride": "i32",
            "TILE_K": chosen.tile_k,
            "SIDE_OUT": bw if transposed else bh,
            "SIDE_IN": bh if transposed else bw,
            "STRIDE_OUT": 1 if transposed else bw,
            "STRIDE_IN": bw if transposed else 1,
            "RELU": True,
        }
    sizes = ("n_in", "n_out", "x_stride", "y_stride", "dy_stride", "grad_stride")
    return compile_kernel(
        function,
        gpu,
        arguments,
        multiples_of_16=sizes,
        num_warps=chosen.num_warps,
        num_stages=chosen.num_stages,
        enable_fp_fusion=True,
    )


def assert_as_expected(compiled: Compiled, gpu: str, dtype: str) -> None:
    """It fits, and multiplies where it should: on tensor cores, or in full float32 precision, and
    PTX names tf32 where that is not so."""
    assert_fits(compiled, gpu)
    if gpu == "gfx942":
        assert "mfma" in compiled.assembly
    elif dtype == "fp32":
        assert "tf32" not in compiled.assembly
    else:
        assert ("wgmma" if gpu == "sm_90" else "mma.sync") in compiled.assembly
    if gpu.startswith("sm_") and dtype != "fp32":
        # All that is multiplied is copied 16 bytes at a time: 4 bytes are indices alone.
        assert ", 0x10," in compiled.assembly
        assert ", 0x8," not in compiled.assembly


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gpu", MAIN_GPUS)
def test_compiles_without_spills(gpu: str, dtype: str, kernel: str) -> None:
    assert_as_expected(compile_block_sparse(kernel, gpu, dtype, (32, 32)), gpu, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("gpu", MAIN_GPUS)
def test_every_block_compiles(gpu: str, dtype: str, block: tuple[int, int], kernel: str) -> None:
    assert_as_expected(compile_block_sparse(kernel, gpu, dtype, block), gpu, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("batch", [1, 32])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("gpu", MAIN_GPUS)
def test_small_batches_compile(gpu: str, dtype: str, batch: int, kernel: str) -> None:
    assert_fits(compile_block_sparse(kernel, gpu, dtype, (64, 64), batch), gpu)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("block", [(16, 16), (128, 128)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gpu", OTHER_GPUS)
def test_compiles_for_other_gpus(gpu: str, dtype: str, block: tuple[int, int], kernel: str) -> None:
    assert_fits(compile_block_sparse(kernel, gpu, dtype, block), gpu)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("block", [(16, 16), (32, 32), (64, 64), (128, 128)])
@pytest.mark.parametrize("gpu", ["sm_80", "sm_90"])
def test_tf32_compiles(gpu: str, block: tuple[int, int], kernel: str) -> None:
    compiled = compile_block_sparse(kernel, gpu, "fp32", block, tf32=True)
    assert_fits(compiled, gpu)
    assert "tf32" in compiled.assembly


def test_supported_blocks() -> None:
    assert block_sparse.supports((16, 128), torch.bfloat16)
    assert not block_sparse.supports((16, 16), torch.float64)
    assert not block_sparse.supports((8, 16), torch.float32)
    assert not block_sparse.supports((1, 1), torch.float32)


def test_the_cpu_is_refused() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    from triton_kernels.require import interpreting

    if interpreting():
        pytest.skip("TRITON_INTERPRET is set: kernels run on the CPU")
    offsets, none = torch.zeros(3, dtype=torch.int32), torch.empty(0, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"tensors on cpu .* move them to a GPU, or use"):
        block_sparse.forward(torch.ones(2, 32), torch.ones(0, 16, 16), offsets, none, none, 32)


def test_missing_triton_is_one_line() -> None:
    code = (
        "import sys, torch; sys.modules['triton'] = None; from triton_kernels import block_sparse\n"
        "x, n = torch.ones(2, 16), torch.zeros(2, dtype=torch.int32)\n"
        "block_sparse.forward(x, torch.ones(0, 16, 16), n, n[:0], n[:0], 16)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    assert done.stderr.strip().splitlines()[-1] == (
        "ImportError: the block-sparse product on a GPU needs the library triton, which is not "
        "installed: pip install 'sparsegrow[gpu]'"
    )


@pytest.mark.parametrize("shared_bytes", sorted({gpu[3] for gpu in GPUS.values()}))
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_heuristics_fit_every_block(dtype: torch.dtype, shared_bytes: int) -> None:
    for kernel in KERNELS:
        for block in BLOCKS:
            for batch in (1, 17, 64, 4096):
                chosen = tuning.heuristic(kernel, block, dtype, batch, shared_bytes)
                assert tuning.checked(kernel, block, chosen) == chosen
                assert 16 <= chosen.tile_m <= max(16, tuning.power_of_two(batch))


def test_a_convolution_is_cut_alike() -> None:
    for kernel in KERNELS:
        plain = tuning.launch(kernel, (16, 32), torch.bfloat16, 100, CPU)
        assert tuning.launch(f"conv_{kernel}", (16, 32), torch.bfloat16, 100, CPU) == plain


def test_overrides_end_with_their_block() -> None:
    def chosen(kernel: str) -> Launch:
        return tuning.launch(kernel, (32, 32), torch.float32, 64, CPU)

    before = [chosen(kernel) for kernel in KERNELS]
    outer, inner = Launch(16, 32, 4, 2), Launch(32, 64, 8, 1)
    with tuning.overridden({"forward": outer}):
        assert chosen("forward") == outer
        assert [chosen(kernel) for kernel in KERNELS[1:]] == before[1:]
        with tuning.overridden({"forward": inner, "weight_gradient": inner}):
            assert chosen("forward") == chosen("weight_gradient") == inner
        assert chosen("forward") == outer
    with pytest.raises(KeyError), tuning.overridden({"forward": outer}):
        raise KeyError
    assert [chosen(kernel) for kernel in KERNELS] == before


@pytest.mark.parametrize(
    ("kernel", "wrong"),
    [
        ("forward", Launch(8, 32, 4, 2)),
        ("forward", Launch(48, 32, 4, 2)),
        ("forward", Launch(16, 8, 4, 2)),
        ("forward", Launch(16, 32, 3, 2)),
        ("forward", Launch(16, 32, 4, 0)),
        ("weight_gradient", Launch(16, 32, 4, 2)),
    ],
)
def test_what_cannot_run_is_refused(kernel: str, wrong: Launch) -> None:
    said = rf"{kernel} of 16x64 blocks cannot run with Launch\(.*\): tile_m from 16, tile_k from"
    with tuning.overridden({kernel: wrong}), pytest.raises(ValueError, match=said):
        tuning.launch(kernel, (16, 64), torch.float32, 64, CPU)


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of tables of its own, and a GPU of the name ``Test GPU (80 GB)``."""
    monkeypatch.setattr(tuning, "TABLES", tmp_path / "tuned")
    monkeypatch.setattr(tuning, "_facts", lambda device: ("Test GPU (80 GB)", 100 << 10))
    tuning._launch.cache_clear()
    yield tmp_path / "tuned"
    tuning._launch.cache_clear()


def test_a_table_is_used(tables: Path) -> None:
    """The batch that is nearest by its power of two, for its own block and dtype alone."""
    few, many = Launch(32, 64, 2, 3), Launch(256, 64, 8, 4)
    key = tuning.key("forward", (32, 32), torch.bfloat16)
    path = tuning.write_table("Test GPU (80 GB)", {key: {64: few, 4096: many}})
    assert path == tables / "test-gpu-80-gb.json"
    assert json.loads(path.read_text()) == {
        "forward 32x32 bfloat16": {"64": [32, 64, 2, 3], "4096": [256, 64, 8, 4]}
    }
    assert tuning.read_table("Test GPU (80 GB)") == {key: {64: few, 4096: many}}

    def chosen(batch: int, block: tuple[int, int] = (32, 32)) -> Launch:
        return tuning.launch("forward", block, torch.bfloat16, batch, CPU)

    assert [chosen(batch) for batch in (1, 64, 128, 3000, 100_000)] == [few] * 3 + [many] * 2
    untuned = tuning.heuristic("forward", (64, 32), torch.bfloat16, 64, 100 << 10)
    assert chosen(64, (64, 32)) == untuned
    with tuning.overridden({"forward": many}):
        assert chosen(64) == many


@pytest.mark.parametrize("text", ["{", "[1]", '{"forward 32x32 float32": {"64": [1]}}'])
def test_a_damaged_table_is_one_line(tables: Path, text: str) -> None:
    tables.mkdir()
    (tables / "test-gpu-80-gb.json").write_text(text)
    with pytest.raises(
        ValueError, match=r"test-gpu-80-gb.json is not a table of launches .*delete"
    ):
        tuning.launch("forward", (32, 32), torch.float32, 64, CPU)


def test_tables_that_are_shipped() -> None:
    """Each can be read, and holds what the kernels can run."""
    for path in tuning.TABLES.glob("*.json"):
        assert tuning.table_path(path.stem) == path
        for name, by_batch in tuning.read_table(path.stem).items():
            kernel, block, dtype = name.split()
            assert isinstance(getattr(torch, dtype), torch.dtype)
            bh, bw = map(int, block.split("x"))
            for chosen in by_batch.values():
                tuning.checked(kernel, (bh, bw), chosen)


def test_tuning_needs_a_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    done = subprocess.run(
        [sys.executable, "benchmarks/tune.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "there is no GPU to tune for: run this where torch.cuda.is_available()"
    ]
