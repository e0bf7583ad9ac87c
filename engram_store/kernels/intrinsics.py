"""Small LLVM building blocks that plain numba code cannot express.

Each one is here because its absence was measured: without prefetch and vector copies a gather is
2-8 times slower, without the 128-bit product an exact remainder is 3 times slower, and numba's
promotion of 32-bit integers to 64 bits halves the width of a rounding loop (docs/performance.md).
Addresses are int64 and are trusted: whoever computes one answers for the memory behind it.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

_I8, _I16, _I32, _I64, _I128 = (ir.IntType(bits) for bits in (8, 16, 32, 64, 128))
_F32 = ir.FloatType()
_LANES = 16
"""Partial sums of `sum_squares`: one AVX-512 register of float32."""


def _i32(value: int) -> ir.Constant:
    return ir.Constant(_I32, value)


@intrinsic
def mulhi(_context: Any, _a: Any, _b: Any) -> Any:
    """Upper 64 bits of the 128-bit product of two uint64."""

    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        wide = [builder.zext(arg, _I128) for arg in args]
        product = builder.lshr(builder.mul(*wide), ir.Constant(_I128, 64))
        return builder.trunc(product, _I64)

    return types.uint64(types.uint64, types.uint64), codegen


def _prefetch(write: int) -> Any:
    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], _I8.as_pointer())
        function_type = ir.FunctionType(ir.VoidType(), [pointer.type, _I32, _I32, _I32])
        function = cgutils.get_or_insert_function(builder.module, function_type, "llvm.prefetch.p0")
        builder.call(function, [pointer, _i32(write), _i32(3), _i32(1)])
        return context.get_dummy_value()

    return codegen


@intrinsic
def prefetch_read(_context: Any, _address: Any) -> Any:
    """Ask for the cache line at an address."""
    return types.void(types.int64), _prefetch(0)


@intrinsic
def prefetch_write(_context: Any, _address: Any) -> Any:
    """Ask for the cache line at an address, to be stored to."""
    return types.void(types.int64), _prefetch(1)


def _copy(width: int) -> Any:
    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        vector = ir.VectorType(_I8, width)
        target, source = (builder.inttoptr(arg, vector.as_pointer()) for arg in args)
        builder.store(builder.load(source, typ=vector, align=1), target, align=1)
        return context.get_dummy_value()

    return codegen


@intrinsic
def copy64(_context: Any, _target: Any, _source: Any) -> Any:
    """Copy 64 bytes between two addresses by vector moves."""
    return types.void(types.int64, types.int64), _copy(64)


@intrinsic
def copy16(_context: Any, _target: Any, _source: Any) -> Any:
    """Copy 16 bytes."""
    return types.void(types.int64, types.int64), _copy(16)


@intrinsic
def copy2(_context: Any, _target: Any, _source: Any) -> Any:
    """Copy 2 bytes: the smallest row element."""
    return types.void(types.int64, types.int64), _copy(2)


@intrinsic
def choose(_context: Any, _condition: Any, _yes: Any, _no: Any) -> Any:
    """One of two int64 without a branch, for conditions that nothing could predict."""

    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        chosen = builder.select(*args)
        chosen.set_metadata("unpredictable", builder.module.add_metadata([]))
        return chosen

    return types.int64(types.boolean, types.int64, types.int64), codegen


@intrinsic
def load1(_context: Any, _address: Any) -> Any:
    """The byte at an address, as uint8."""

    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.load(builder.inttoptr(args[0], _I8.as_pointer()), typ=_I8)

    return types.uint8(types.int64), codegen


@intrinsic
def load8(_context: Any, _address: Any) -> Any:
    """The int64 at an address that is a multiple of 8."""

    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.load(builder.inttoptr(args[0], _I64.as_pointer()), typ=_I64, align=8)

    return types.int64(types.int64), codegen


@intrinsic
def store1(_context: Any, _address: Any, _value: Any) -> Any:
    """Store a uint8 at an address."""

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        builder.store(args[1], builder.inttoptr(args[0], _I8.as_pointer()))
        return context.get_dummy_value()

    return types.void(types.int64, types.uint8), codegen


def _bf16_to_f32(builder: Any, bits: Any) -> Any:
    return builder.bitcast(builder.shl(builder.zext(bits, _I32), _i32(16)), _F32)


@intrinsic
def widen(_context: Any, value: Any) -> Any:
    """float32 value of one stored element.

    The stored dtype is told by the type: uint16 holds bfloat16 bits, int16 holds float16 bits,
    float32 is itself.
    """

    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        if value == types.uint16:
            return _bf16_to_f32(builder, args[0])
        if value == types.int16:
            return builder.fpext(builder.bitcast(args[0], ir.HalfType()), _F32)
        return args[0]

    return types.float32(value), codegen


def _to_bf16(builder: Any, value: Any, addend: Any) -> Any:
    """Upper half of the float's bits plus `addend`; NaN stays NaN instead of wrapping around."""
    bits = builder.bitcast(value, _I32)
    rounded = builder.lshr(builder.add(bits, addend), _i32(16))
    quiet = builder.or_(builder.lshr(bits, _i32(16)), _i32(0x40))
    is_nan = builder.fcmp_unordered("uno", value, value)
    return builder.trunc(builder.select(is_nan, quiet, rounded), _I16)


@intrinsic
def narrow(_context: Any, _value: Any, like: Any) -> Any:
    """A float32 in the stored dtype of `like`, rounded to nearest, ties to even."""

    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        if like == types.uint16:
            bits = builder.bitcast(args[0], _I32)
            odd = builder.and_(builder.lshr(bits, _i32(16)), _i32(1))
            return _to_bf16(builder, args[0], builder.add(odd, _i32(0x7FFF)))
        if like == types.int16:
            return builder.bitcast(builder.fptrunc(args[0], ir.HalfType()), _I16)
        return args[0]

    return like(types.float32, like), codegen


@intrinsic
def narrow_stochastic(_context: Any, _value: Any, _base: Any, _element: Any) -> Any:
    """A float32 as bfloat16 bits, rounded up with the probability of what is cut off.

    The random bits are a hash of `base` (uint32, one per row and step) and the element's number,
    so the result depends on nothing else: not on threads, order or memory. Mixing function: two
    rounds of multiply and xor-shift on 32 bits (Wellons' "lowbias32" constants).
    """

    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        value, base, element = args
        step = builder.mul(builder.trunc(element, _I32), _i32(0x9E3779B9))
        mixed = builder.add(base, step)
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
            mixed = builder.xor(mixed, builder.lshr(mixed, _i32(shift)))
            mixed = builder.mul(mixed, _i32(factor))
        mixed = builder.xor(mixed, builder.lshr(mixed, _i32(16)))
        return _to_bf16(builder, value, builder.and_(mixed, _i32(0xFFFF)))

    return types.uint16(types.float32, types.uint32, types.int64), codegen


def _lane_sum(builder: Any, lanes: Any) -> Any:
    """Sum of a vector's lanes by halving: lane i and lane i + width / 2, and so on."""
    width = _LANES
    while width > 1:
        width //= 2
        halves = []
        for first in (0, width):
            indices = ir.Constant(
                ir.VectorType(_I32, width), [first + lane for lane in range(width)]
            )
            undefined = ir.Constant(lanes.type, ir.Undefined)
            halves.append(builder.shuffle_vector(lanes, undefined, indices))
        lanes = builder.fadd(*halves)
    return builder.extract_element(lanes, _i32(0))


@intrinsic
def sum_squares(_context: Any, values: Any, _scale: Any) -> Any:
    """Sum of `(scale * value)**2` over a contiguous float32 vector, in one fixed order.

    Element i goes to lane i % 16; lanes are summed by halving. Vectorised without reassociation,
    so numpy repeats it bit for bit (`optimizers.reference.sum_squares`).
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, args[0])
        length = cgutils.unpack_tuple(builder, array.shape, 1)[0]
        vector = ir.VectorType(_F32, _LANES)
        zero = ir.Constant(vector, [0.0] * _LANES)
        factors = zero
        for lane in range(_LANES):
            factors = builder.insert_element(factors, args[1], _i32(lane))
        lanes = cgutils.alloca_once_value(builder, zero)
        full = builder.udiv(length, ir.Constant(_I64, _LANES))
        with cgutils.for_range(builder, full) as loop:
            start = builder.gep(array.data, [builder.mul(loop.index, ir.Constant(_I64, _LANES))])
            block = builder.load(builder.bitcast(start, vector.as_pointer()), typ=vector, align=4)
            scaled = builder.fmul(block, factors)
            builder.store(
                builder.fadd(builder.load(lanes, typ=vector), builder.fmul(scaled, scaled)), lanes
            )
        done = builder.mul(full, ir.Constant(_I64, _LANES))
        with cgutils.for_range(builder, builder.sub(length, done)) as loop:
            element = builder.load(builder.gep(array.data, [builder.add(done, loop.index)]))
            scaled = builder.fmul(element, args[1])
            lane = builder.trunc(loop.index, _I32)
            current = builder.load(lanes, typ=vector)
            sum_ = builder.fadd(
                builder.extract_element(current, lane), builder.fmul(scaled, scaled)
            )
            builder.store(builder.insert_element(current, sum_, lane), lanes)
        return _lane_sum(builder, builder.load(lanes, typ=vector))

    return types.float32(values, types.float32), codegen
