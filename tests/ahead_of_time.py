"""Compiles a kernel for GPUs that are not there, and says what it uses of them."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest

# Backend, architecture, threads of a warp, and the bytes of shared memory that a block may have.
GPUS: dict[str, tuple[str, int | str, int, int]] = {
    "sm_80": ("cuda", 80, 32, 163 << 10),
    "sm_86": ("cuda", 86, 32, 99 << 10),
    "sm_89": ("cuda", 89, 32, 99 << 10),
    "sm_90": ("cuda", 90, 32, 227 << 10),
    "sm_100": ("cuda", 100, 32, 227 << 10),
    "sm_120": ("cuda", 120, 32, 99 << 10),
    "gfx90a": ("hip", "gfx90a", 64, 64 << 10),
    "gfx942": ("hip", "gfx942", 64, 64 << 10),
    "gfx950": ("hip", "gfx950", 64, 160 << 10),
}
# What `make test` compiles every kernel for; the others are slow tests.
MAIN_GPUS = ("sm_80", "sm_90", "gfx942")


def version(module: Any) -> tuple[int, int]:
    """Major and minor."""
    major, minor = module.__version__.split(".")[:2]
    return int(major), int(minor)


class Compiled(NamedTuple):
    """registers: of a thread. spilled: bytes of stack of a thread on NVIDIA, spilled vector
    registers on AMD. shared: bytes of shared memory. assembly: PTX or AMD's."""

    registers: int
    spilled: int
    shared: int
    assembly: str


def compile_kernel(
    kernel: Any,
    gpu: str,
    arguments: Mapping[str, str | int],
    multiples_of_16: tuple[str, ...] = (),
    **options: Any,
) -> Compiled:
    """arguments: by name, a type such as ``*bf16`` or ``i32``, or the value of a constant.
    Pointers are taken to be aligned to 16 bytes, as PyTorch's are; multiples_of_16: integers that
    always are. options: num_warps, num_stages and the like.

    Skips the test when triton or one of its tools is missing.
    """
    triton = pytest.importorskip("triton", minversion="3.6")
    from triton.backends import backends
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    if not isinstance(kernel, triton.runtime.JITFunction):
        pytest.skip("TRITON_INTERPRET is set: kernels are interpreted, not compiled")
    backend, arch, warp, _ = GPUS[gpu]
    if ("nvidia" if backend == "cuda" else "amd") not in backends:
        pytest.skip(f"this build of triton has no backend for {gpu}")
    assert set(arguments) == set(kernel.arg_names)
    types = {name: arguments[name] for name in kernel.arg_names}
    signature = {k: v if isinstance(v, str) else "constexpr" for k, v in types.items()}
    aligned = [
        index
        for index, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or name in multiples_of_16
    ]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={k: v for k, v in types.items() if not isinstance(v, str)},
        attrs={(index,): [["tt.divisibility", 16]] for index in aligned},
    )
    binary = compile(source, target=GPUTarget(backend, arch, warp), options=options)
    if backend == "cuda":
        registers, spilled = _nvidia_usage(triton, binary.asm["cubin"])
        assembly = binary.asm["ptx"]
    else:
        assembly = binary.asm["amdgcn"]
        registers, spilled = (
            int(re.search(rf"\.{name}:\s*(\d+)", assembly)[1])
            for name in ("vgpr_count", "vgpr_spill_count")
        )
    return Compiled(registers, spilled, binary.metadata.shared, assembly)


def assert_fits(compiled: Compiled, gpu: str) -> None:
    """Nothing is spilled, and the shared memory is there."""
    assert compiled.spilled == 0, f"{gpu}: {compiled[:3]}"
    assert compiled.shared <= GPUS[gpu][3], f"{gpu}: {compiled[:3]}"


def _nvidia_usage(triton: Any, cubin: bytes) -> tuple[int, int]:
    """Registers, and bytes of stack: where ptxas puts what it spills."""
    shipped = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    tool = str(shipped) if shipped.is_file() else shutil.which("cuobjdump")
    if tool is None:
        pytest.skip("no cuobjdump, neither in triton nor on the path: spills cannot be seen")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        )
    usage = re.search(r"REG:(\d+) STACK:(\d+)", done.stdout)
    assert usage, done.stdout + done.stderr
    return int(usage[1]), int(usage[2])
