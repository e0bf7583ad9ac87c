"""Whole blocks of rows between their storage dtype and float32."""

from numba import njit

from engram_store.kernels.intrinsics import narrow, widen
from engram_store.kernels.rows import JIT


@njit(**JIT)
def widen_rows(gradients, out):
    """float32 values of bfloat16 bits: uint16 [n, dim] to float32 [n, dim]."""
    n, dim = gradients.shape
    for i in range(n):
        source, target = gradients[i], out[i]
        for k in range(dim):
            target[k] = widen(source[k])


@njit(**JIT)
def narrow_scaled(values, scale, out):
    """`values * scale` (float32 [n, dim]) rounded to nearest into `out`'s dtype.

    float16 is told by int16, as everywhere in the kernels.
    """
    for i in range(values.shape[0]):
        source, target = values[i], out[i]
        for k in range(values.shape[1]):
            target[k] = narrow(source[k] * scale, target[k])
