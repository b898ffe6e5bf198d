"""Loops over vector registers, for kernels that numba compiles: what the compiler does not do by
itself is written in its intermediate language.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir

# Numbers in a vector: one register of AVX-512, two of AVX2, four of NEON.
WIDTH = 16
INDEX = ir.IntType(64)


class Loop:
    """Runs over nonzeros [first, last) while values are carried from one to the next."""

    def __init__(self, context: Any, builder: Any, signature: Any, args: Any) -> None:
        self.context, self.builder = context, builder
        self.signature, self.args = signature, args

    def data(self, at: int) -> Any:
        """Address of the first element of an array argument."""
        kind = self.signature.args[at]
        if kind.layout != "C":
            raise TypeError(f"a kernel reads memory as it lies, and not {kind}")
        return self.context.make_array(kind)(self.context, self.builder, self.args[at]).data

    def run(
        self, first: Any, last: Any, carried: list[Any], body: Callable[..., Any], step: int = 1
    ) -> list[Any]:
        """body(k, values) -> values, every ``step``-th k. Returns the last ones."""
        builder = self.builder
        entry = builder.block
        loop, done = builder.append_basic_block(), builder.append_basic_block()
        builder.cbranch(builder.icmp_signed("<", first, last), loop, done)
        builder.position_at_end(loop)
        k = builder.phi(INDEX)
        k.add_incoming(first, entry)
        values = [builder.phi(value.type) for value in carried]
        for phi, value in zip(values, carried, strict=True):
            phi.add_incoming(value, entry)
        new = body(k, values)
        end = builder.block  # another one than ``loop`` where the body holds a loop of its own
        following = builder.add(k, ir.Constant(INDEX, step))
        k.add_incoming(following, end)
        for phi, value in zip(values, new, strict=True):
            phi.add_incoming(value, end)
        builder.cbranch(builder.icmp_signed("<", following, last), loop, done)
        builder.position_at_end(done)
        results = [builder.phi(value.type) for value in carried]
        for phi, before, after in zip(results, carried, new, strict=True):
            phi.add_incoming(before, entry)
            phi.add_incoming(after, end)
        return results

    def row(self, x: Any, index: Any, k: Any, length: int) -> Any:
        """Address of the row of x that index[k], which is not negative, says."""
        builder = self.builder
        at = self.number(index, k)
        return builder.gep(x, [builder.mul(at, ir.Constant(INDEX, length))])

    def number(self, array: Any, k: Any) -> Any:
        """array[k], which is not negative, as an index."""
        found = self.builder.load(self.builder.gep(array, [k]))
        return found if found.type == INDEX else self.builder.zext(found, INDEX)

    def vectors(self, address: Any, count: int) -> list[Any]:
        kind = ir.VectorType(address.type.pointee, WIDTH)
        loaded = []
        for at in self.places(address, count):
            value = self.builder.load(self.builder.bitcast(at, kind.as_pointer()))
            value.align = _alignment(kind)
            loaded.append(value)
        return loaded

    def store(self, values: list[Any], address: Any) -> None:
        for value, at in zip(values, self.places(address, len(values)), strict=True):
            target = self.builder.bitcast(at, value.type.as_pointer())
            self.builder.store(value, target).align = _alignment(value.type)

    def places(self, address: Any, count: int) -> list[Any]:
        return [self.builder.gep(address, [ir.Constant(INDEX, WIDTH * i)]) for i in range(count)]

    def prefetch(self, address: Any, write: bool = False) -> None:
        """Brings the line of the cache around an address that is read, or written, soon. May lie
        anywhere."""
        byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
        hint = self.builder.module.declare_intrinsic("llvm.prefetch", [byte], kind)
        # In all caches, of data.
        self.builder.call(
            hint, [self.builder.bitcast(address, byte), number(int(write)), number(3), number(1)]
        )

    def opaque(self, number: Any) -> Any:
        """The same number or address, of which the compiler knows nothing."""
        kind = ir.FunctionType(number.type, [number.type])
        return self.builder.call(ir.InlineAsm(kind, "", "=r,0"), [number])

    def fused(self, a: Any, b: Any, c: Any) -> Any:
        """a * b + c."""
        letter = "f32" if isinstance(a.type.element, ir.FloatType) else "f64"
        return self.call(f"llvm.fma.v{WIDTH}{letter}", a.type, [a, b, c])

    def call(self, name: str, result: Any, values: list[Any]) -> Any:
        """An intrinsic function of LLVM."""
        module = self.builder.module
        declared = module.globals.get(name)
        if declared is None:
            kind = ir.FunctionType(result, [value.type for value in values])
            declared = ir.Function(module, kind, name=name)
        return self.builder.call(declared, values)

    def totals(self, vectors: list[Any]) -> Any:
        """The sums of the numbers of each of up to 16 vectors, as one vector of so many."""
        wanted = len(vectors)
        # Within 128 bits of single precision first, which are the cheapest to mix.
        for lane, unit in ((4, 2), (4, 1), (WIDTH, 8), (WIDTH, 4)):
            if lane == WIDTH and len(vectors) == 1:
                vectors = [self._folded(vectors, unit)]
                continue
            if len(vectors) % 2:
                vectors = [*vectors, ir.Constant(vectors[0].type, [0.0] * WIDTH)]
            pairs = zip(vectors[::2], vectors[1::2], strict=True)
            vectors = [self._folded(pair, unit, lane) for pair in pairs]
        (sums,) = vectors
        return sums if sums.type.count == wanted else self._picked([sums], list(range(wanted)))

    def _folded(self, vectors: Sequence[Any], unit: int, lane: int = WIDTH) -> Any:
        """Every second ``unit`` of numbers plus the one that follows it, lane by lane, in each of
        them first those of the first vector."""
        count = vectors[0].type.count
        even = [
            count * which + start + i
            for first in range(0, count, lane)
            for which in range(len(vectors))
            for start in range(first, min(first + lane, count), 2 * unit)
            for i in range(unit)
        ]
        odd = [i + unit for i in even]
        return self.builder.fadd(self._picked(vectors, even), self._picked(vectors, odd))

    def _picked(self, vectors: Sequence[Any], lanes: list[int]) -> Any:
        """Some numbers of one or two vectors."""
        mask = ir.Constant(ir.VectorType(ir.IntType(32), len(lanes)), lanes)
        return self.builder.shuffle_vector(vectors[0], vectors[-1], mask)

    def interleaved(self, a: Any, b: Any) -> tuple[Any, Any]:
        """The numbers of two vectors, one of a and one of b in turn: the first half, the second."""
        first, second = (
            [WIDTH * (i % 2) + i // 2 + start for i in range(WIDTH)] for start in (0, WIDTH // 2)
        )
        return self._picked((a, b), first), self._picked((a, b), second)

    def outer(self, numbers: list[Any], row: list[Any], sums: list[Any]) -> list[Any]:
        """sums + the products of every number, spread, with every vector of the row."""
        products = [(number, vector) for number in numbers for vector in row]
        return [self.fused(a, b, s) for (a, b), s in zip(products, sums, strict=True)]

    def spread(self, number: Any) -> Any:
        """A vector of one number."""
        kind = ir.VectorType(number.type, WIDTH)
        nothing = ir.Constant(kind, ir.Undefined)
        one = self.builder.insert_element(nothing, number, ir.Constant(ir.IntType(32), 0))
        return self._picked((one, nothing), [0] * WIDTH)


def _alignment(kind: Any) -> int:
    """Bytes at multiples of which vectors begin: any number may be the first."""
    return min(4, kind.element.width // 8) if isinstance(kind.element, ir.IntType) else 4


def zero(address: Any) -> Any:
    return ir.Constant(ir.VectorType(address.type.pointee, WIDTH), [0.0] * WIDTH)
