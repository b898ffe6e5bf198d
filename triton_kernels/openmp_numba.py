"""Compiled kernels on the threads that PyTorch's own operations run on.

Threads of our own would share the processor with those of PyTorch's OpenMP, which spin for a while
after every operation; and waking them through Python takes longer than a small product.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import typeof, types
from numba._dispatcher import compute_fingerprint
from numba.core import cgutils
from numba.extending import intrinsic

from triton_kernels.compiled_numba import compiled, jit_is_off
from triton_kernels.vectors import INDEX

# What threads share: the next part, whether one has failed, the number of parts and of threads.
_NEXT, _FAILED, _COUNT, _THREADS = range(4)
# Of every kernel, after its other arguments.
_ENDS = types.int64, types.int64

# Where the machine code of each kernel begins, for each kind of arguments.
_entries: dict[tuple[Any, bytes], int] = {}


def run(
    kernel: Callable[..., None], arguments: Sequence[Any], parts: Sequence[tuple[int, int]]
) -> None:
    """``kernel(*arguments, first, last)`` for every part, each on the thread that comes for it
    first. kernel: a function that numba compiled, which must not need the interpreter. Returns when
    all are done. Raises RuntimeError if one failed, which then says nothing more."""
    arguments = tuple(arguments)
    kind = kernel, compute_fingerprint(arguments)
    if kind not in _entries:
        _entries[kind] = _entry(kernel, typeof(arguments).types)
    # As many as PyTorch always asks for: for fewer, the others would end, and begin anew later.
    state = np.array([0, 0, len(parts), max(len(parts), torch.get_num_threads())])
    _team(arguments, np.array(parts, np.int64).reshape(-1), state, _fork(), _entries[kind])
    if state[_FAILED]:
        raise RuntimeError(f"{kernel.__name__} failed on a thread, probably for lack of memory")


def _entry(kernel: Any, arguments: Sequence[Any]) -> int:
    kernel.compile((*arguments, *_ENDS))
    made = kernel.overloads[(*arguments, *_ENDS)]
    return int(made.library.get_pointer_to_function(made.fndesc.llvm_func_name))


def available() -> bool:
    return _fork() != 0


@cache
def _fork() -> int:
    """Address of the function of PyTorch's OpenMP that runs another on many threads; 0 where there
    is none of this name."""
    if not sys.platform.startswith("linux") or jit_is_off():
        return 0
    # As PyTorch's own calls are looked up: in the whole process, which may have been started with
    # another OpenMP, then in what PyTorch was linked with.
    for library in (None, str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")):
        with suppress(OSError, AttributeError):
            return ctypes.cast(ctypes.CDLL(library).GOMP_parallel, ctypes.c_void_p).value or 0
    return 0


def _open(typing: Any, arguments: Any, parts: Any, state: Any, fork: Any, entry: Any) -> Any:
    """Has threads run the parts."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        parts_, state_ = (
            context.make_array(kind)(context, builder, value).data
            for kind, value in ((parts, args[1]), (state, args[2]))
        )
        given = cgutils.pack_struct(builder, [args[0], parts_, state_, args[4]])
        room = cgutils.alloca_once_value(builder, given)
        share = _share(context, builder.module, room.type, (*arguments.types, *_ENDS))
        number = ir.IntType(32)
        taken = [share.type, cgutils.voidptr_t, number, number]
        kind = ir.FunctionType(ir.VoidType(), taken).as_pointer()
        count = builder.load(builder.gep(state_, [INDEX(_THREADS)]))
        # The last argument asks for nothing.
        values = [share, builder.bitcast(room, cgutils.voidptr_t)]
        values += [builder.trunc(count, number), number(0)]
        builder.call(builder.inttoptr(args[3], kind), values)
        return context.get_dummy_value()

    return types.void(arguments, parts, state, fork, entry), generate


def _share(context: Any, module: Any, kind: Any, taken: tuple[Any, ...]) -> Any:
    """The function that every thread runs: it takes parts as long as there are some.

    kind: of the pointer that it gets, to the arguments, the parts, the state, and the address of
    the kernel; taken: types of all arguments of the kernel.
    """
    name = module.get_unique_name("share")
    share = ir.Function(module, ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t]), name)
    share.linkage = "internal"
    builder = ir.IRBuilder(share.append_basic_block())
    again, work, done = (share.append_basic_block() for _ in range(3))
    given = builder.load(builder.bitcast(share.args[0], kind))
    arguments, parts, state, entry = (builder.extract_value(given, i) for i in range(4))
    arguments = [builder.extract_value(arguments, i) for i in range(len(taken) - len(_ENDS))]

    def field(at: int) -> Any:
        return builder.gep(state, [INDEX(at)])

    count = builder.load(field(_COUNT))
    builder.branch(again)
    builder.position_at_end(again)
    own = builder.atomic_rmw("add", field(_NEXT), INDEX(1), "monotonic")
    builder.cbranch(builder.icmp_signed("<", own, count), work, done)
    builder.position_at_end(work)
    first = builder.gep(parts, [builder.mul(own, INDEX(2))])
    ends = [builder.load(builder.gep(first, [INDEX(i)])) for i in range(2)]
    # Its address, not its code, which would be optimised once more.
    convention = context.call_conv
    called = convention.get_function_type(types.none, taken).as_pointer()
    kernel = builder.inttoptr(entry, called)
    status, _ = convention.call_function(builder, kernel, types.none, taken, arguments + ends)
    with builder.if_then(status.is_error):
        builder.store(INDEX(1), field(_FAILED))
    builder.branch(again)
    builder.position_at_end(done)
    builder.ret_void()
    return share


_open_team: Any = intrinsic(_open)


@compiled()
def _team(arguments, parts, state, fork, entry):  # type: ignore[no-untyped-def]
    _open_team(arguments, parts, state, fork, entry)
