"""Rows of published checkpoints in 8-bit floats, as float32 and bfloat16.

numpy has neither format: e4m3fn values are uint8 codes, bfloat16 values the upper 16 bits of
float32.
"""

from functools import cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

from engram_store.errors import DtypeError, ShapeError

SCALE_BLOCK: Final = 32
"""Consecutive values of a row that share a scale."""
_EXPONENT_BIAS = 7
_MANTISSA_BITS = 3


@cache
def _e4m3fn_values() -> NDArray[np.float32]:
    """float32 [256]: value of every code; 0x7F and 0xFF are NaN, infinity does not exist.

    Source: Micikevicius et al., "FP8 Formats for Deep Learning" (arXiv:2209.05433).
    """
    codes = np.arange(128)
    exponent, mantissa = codes >> _MANTISSA_BITS, codes & 7
    fraction = np.where(exponent > 0, 8 + mantissa, mantissa)
    values = np.ldexp(fraction, np.maximum(exponent, 1) - _EXPONENT_BIAS - _MANTISSA_BITS)
    values[127] = np.nan
    return np.concatenate([values, -values]).astype(np.float32)


def dequantize_blocks(codes: NDArray[np.uint8], scales: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Values of rows with one power-of-two scale per 32 columns, as DeepSeek-V4.1 stores them.

    A scale byte is the exponent field of a float32, as in the published code. Its edges differ
    from the ue8m0 format: 0 is zero instead of 2^-127, 255 infinity instead of NaN.

    Args:
        codes: uint8 [n, dim] e4m3fn codes, dim a multiple of 32.
        scales: uint8 [n, dim / 32].

    Returns:
        float32 [n, dim]; large codes with scales above 2^119 overflow to infinity.

    Raises:
        DtypeError, ShapeError.
    """
    _check_codes(codes)
    if scales.dtype != np.uint8:
        raise DtypeError("scales", scales.dtype, "uint8")
    rows, dim = codes.shape
    if dim % SCALE_BLOCK or scales.shape != (rows, dim // SCALE_BLOCK):
        raise ShapeError("scales", scales.shape, f"[{rows}, {dim} / {SCALE_BLOCK}]")
    factors = (scales.astype(np.uint32) << np.uint32(23)).view(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        return _e4m3fn_values()[codes] * np.repeat(factors, SCALE_BLOCK, axis=1)


def dequantize_scalar(codes: NDArray[np.uint8], scale: float) -> NDArray[np.uint16]:
    """Values of rows with one scale for the whole table, as Qwen3.8-PLE stores them.

    Both factors are rounded to bfloat16 before they are multiplied, as in the published code.

    Args:
        codes: uint8 [n, dim] e4m3fn codes.
        scale: the checkpoint's `weight_scale`.

    Returns:
        uint16 [n, dim]: bits of bfloat16.

    Raises:
        DtypeError, ShapeError.
    """
    _check_codes(codes)
    rounded = bfloat16_bits(np.array([scale], np.float32)).astype(np.uint32) << np.uint32(16)
    with np.errstate(over="ignore", invalid="ignore"):
        return bfloat16_bits(_e4m3fn_values()[codes] * rounded.view(np.float32))


def bfloat16_bits(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Values rounded to bfloat16, to nearest and ties to even; NaN stays NaN.

    Args:
        values: float32, any shape.

    Returns:
        uint16, the same shape.
    """
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    ties_to_even = np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))
    quiet_nan = np.uint32(0x7FC00000)
    rounded = np.where(np.isnan(values), quiet_nan, bits + ties_to_even)
    return (rounded >> np.uint32(16)).astype(np.uint16)


def _check_codes(codes: NDArray[np.uint8]) -> None:
    if codes.dtype != np.uint8:
        raise DtypeError("codes", codes.dtype, "uint8")
    if codes.ndim != 2:
        raise ShapeError("codes", codes.shape, "[n, dim]")
