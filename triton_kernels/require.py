"""One line that says what is missing, for whoever launches a kernel."""

from __future__ import annotations

import os

import triton_kernels


def require_triton(purpose: str) -> None:
    """To be called before a kernel is imported.

    Raises ImportError, in one line that begins with ``purpose``, when triton is not installed, is
    another project's, or when another project's ``triton_kernels`` was installed over ours.
    """
    if not hasattr(triton_kernels, "sparse_linear"):
        raise ImportError(
            f"{purpose}: the package triton_kernels at {triton_kernels.__path__[0]} is another "
            "project's: pip uninstall triton_kernels, then reinstall sparsegrow"
        )
    try:
        import triton
    except ImportError as error:
        raise ImportError(
            f"{purpose} needs the library triton, which is not installed: "
            "pip install 'sparsegrow[gpu]'"
        ) from error
    if not hasattr(triton, "jit"):
        raise ImportError(
            f"{purpose}: the package triton at {triton.__path__[0]} is another project's: "
            "pip uninstall triton, then pip install 'sparsegrow[gpu]'"
        )


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU: the environment had
    ``TRITON_INTERPRET=1`` when they were imported."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on")
