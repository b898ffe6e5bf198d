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
import threading
from collections.abc import Callable, Hashable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numba
from numba.core.caching import FunctionCache
from numba.core.serialize import dumps


def compiled(*parameters: Hashable) -> Callable[[Callable[..., Any]], Any]:
    """``numba.njit`` for a function of this package that runs without the interpreter's lock.

    parameters: what tells apart the functions that the same lines make, by what they close over;
    numba cannot do so itself, where that is a loop in LLVM's language.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        kernel: Any = numba.njit(nogil=True)(function)
        # RuntimeError: there is nowhere to keep it.
        with suppress(RuntimeError, OSError):
            kernel._cache = _Cache(function, parameters)
        return kernel

    return decorate


_DIGEST = hashlib.sha256().digest_size


class _Cache(FunctionCache):  # type: ignore[misc]
    """A file for each kind of arguments, named by all that may differ at the same time: numba's own
    index gives two of them the same file when two processes write at once, and then one is run in
    place of the other."""

    def __init__(self, function: Callable[..., Any], parameters: tuple[Hashable, ...]) -> None:
        super().__init__(function)
        self._parameters = parameters

    def load_overload(self, sig: Any, target_context: Any) -> Any:
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
        if not self._impl.check_cachable(data):
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
        kind = repr((self._parameters, sig, codegen.magic_tuple()))
        name = hashlib.sha256(kind.encode()).hexdigest()[:16]
        return Path(self.cache_path) / f"{self._impl.filename_base}.{name}.nbc"


def _digest(payload: bytes) -> bytes:
    """Of machine code, and what else it was made from."""
    return hashlib.sha256(f"{numba.__version__} {_sources()}".encode() + payload).digest()


@cache
def _sources() -> str:
    """Of the functions that a kernel may call, too: numba looks at its own file alone."""
    here = Path(__file__).parent
    files = [*sorted(here.glob("*_numba.py")), here / "vectors.py"]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
