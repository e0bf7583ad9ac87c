"""8-bit rows as float32 and bfloat16."""

import numpy as np
import pytest

from engram_store.errors import DtypeError, ShapeError
from engram_store.recipes.quantization import (
    bfloat16_bits,
    dequantize_blocks,
    dequantize_scalar,
)


def codes(*first: int) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    return np.array([[*first, *[0] * (32 - len(first))]], np.uint8)


def scales(*bytes_: int) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    return np.array([bytes_], np.uint8)


def test_codes_are_sign_exponent_mantissa() -> None:
    """1, 1.5, smallest subnormal, smallest normal, largest, minus one, NaN."""
    got = dequantize_blocks(codes(0x38, 0x3C, 0x01, 0x08, 0x7E, 0xB8, 0x7F), scales(127))[0, :7]
    expected = np.array([1, 1.5, 2**-9, 2**-6, 448, -1, np.nan], np.float32)
    np.testing.assert_array_equal(got, expected)


def test_scale_bytes_are_float32_exponents() -> None:
    """128 doubles; the edges are zero and infinity, as in the published code."""
    for byte, expected in ((128, 2.0), (1, 2.0**-126), (0, 0.0), (255, np.inf)):
        assert dequantize_blocks(codes(0x38), scales(byte))[0, 0] == expected


def test_each_block_of_32_columns_has_its_own_scale() -> None:
    ones = np.full((1, 64), 0x38, np.uint8)
    got = dequantize_blocks(ones, scales(127, 129))
    np.testing.assert_array_equal(got, np.repeat(np.array([[1, 4]], np.float32), 32, axis=1))


def test_scalar_scale_is_rounded_to_bfloat16_first() -> None:
    """1.003 is 1 in bfloat16, so 1.75 stays; 1.75525 would round up to 0x3FE1."""
    assert dequantize_scalar(codes(0x3E), 1.003)[0, 0] == 0x3FE0


def test_bfloat16_rounds_to_nearest_ties_to_even_and_keeps_nan() -> None:
    bits = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x7F7FFFFF, 0x7FFFFFFF], np.uint32)
    expected = [0x3F80, 0x3F82, 0x3F81, 0x7F80, 0x7FC0]
    assert bfloat16_bits(bits.view(np.float32)).tolist() == expected


def test_wrong_arrays_are_refused() -> None:
    with pytest.raises(DtypeError):
        dequantize_blocks(codes().astype(np.int8), scales(127))
    with pytest.raises(DtypeError):
        dequantize_blocks(codes(), np.ones((1, 1), np.float32))
    with pytest.raises(ShapeError):
        dequantize_blocks(codes(), scales(127, 127))
    with pytest.raises(ShapeError):
        dequantize_scalar(codes()[0], 1.0)
