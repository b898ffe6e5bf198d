"""numba's compiler for kernels, which keeps what it compiled: a process would otherwise wait
some seconds for its first step.

Machine code lies where numba puts it: beside the source, in the user's cache where that cannot be
written to, or in ``NUMBA_CACHE_DIR``. It is of one processor, one version of numba, and one of our
sources.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import sys
import threading
from collections.abc import Callable, Hashable
from contextlib import suppress
from pathlib import Path
from typing import Any

import llvmlite
import numba
from numba.core.caching import FunctionCache
from numba.core.serialize import dumps

_config: Any = numba.config
_DIGEST = hashlib.sha256().digest_size
# Of numba, by which the same function becomes other code.
_SETTINGS = (
    *("BOUNDSCHECK", "OPT", "LOOP_VECTORIZE", "SLP_VECTORIZE", "DEBUGINFO_DEFAULT"),
    *("DISABLE_INTEL_SVML", "FULL_TRACEBACKS"),
)


def jit_is_off() -> bool:
    """By ``NUMBA_DISABLE_JIT``, which runs kernels in Python to look into them."""
    return bool(_config.DISABLE_JIT)


def compiled(*parameters: Hashable) -> Callable[[Callable[..., Any]], Any]:
    """``numba.njit`` for a function of this package that runs without the interpreter's lock.

    parameters: what tells apart the functions that the same lines make, by what they close over;
    numba cannot do so itself, where that is a loop in LLVM's language.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        # Machine code is found by the name of its function and a number, which in the process that
        # kept it may have been that of another one here.
        function.__qualname__ += "".join(f"_{parameter}" for parameter in parameters)
        kernel: Any = numba.njit(nogil=True)(function)
        # Edited since they were imported, sources do not say what the code is.
        if not jit_is_off() and _sources() == _IMPORTED:
            with suppress(RuntimeError, OSError):  # there is nowhere to keep it
                kernel._cache = _Cache(function)
        return kernel

    return decorate


class _Cache(FunctionCache):  # type: ignore[misc]
    """A file for each kind of arguments, named by all that may differ at the same time: numba's own
    index gives two of them the same file when two processes write at once, and then one is run in
    place of the other."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        self._kind = function.__module__, function.__qualname__

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        if not self._enabled:
            return None
        target_context.refresh()
        try:
            data = self._file(sig, target_context.codegen()).read_bytes()
        except OSError:
            return None
        digest, payload = data[:_DIGEST], data[_DIGEST:]
        if digest != _digest(payload):  # damaged, or of other sources
            return None
        return self._impl.rebuild(target_context, pickle.loads(payload))

    def save_overload(self, sig: Any, data: Any) -> None:
        if not self._enabled or not self._impl.check_cachable(data):
            return
        payload = dumps(self._impl.reduce(data))
        # No room, or no permission: the next process compiles it again.
        with suppress(OSError):
            self._impl.locator.ensure_cache_path()
            file = self._file(sig, data.codegen)
            new = file.with_name(f"{file.name}.{os.getpid()}-{threading.get_ident()}")
            try:
                new.write_bytes(_digest(payload) + payload)
                new.replace(file)
            finally:
                new.unlink(missing_ok=True)

    def _file(self, sig: Any, codegen: Any) -> Path:
        settings = [getattr(_config, name, None) for name in _SETTINGS]
        kind = (*self._kind, sig, codegen.magic_tuple(), sys.version_info[:2], settings)
        name = hashlib.sha256(repr(kind).encode()).hexdigest()[:20]
        return Path(self.cache_path) / f"sparsegrow-{name}.nbc"


def _digest(payload: bytes) -> bytes:
    """Of machine code, and of what else it was made from and by."""
    versions = f"{numba.__version__} {llvmlite.__version__} {_IMPORTED}"
    return hashlib.sha256(versions.encode() + payload).digest()


def _sources() -> str:
    """Of the functions that a kernel may call, too: numba looks at its own file alone."""
    here = Path(__file__).parent
    files = [*sorted(here.glob("*_numba.py")), here / "vectors.py"]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


_IMPORTED = _sources()
