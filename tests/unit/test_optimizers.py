"""Compiled update rules against the numpy oracle, and against torch's published vectors."""

import numpy as np
import pytest

from engram_store.optimizers import apply_reference, rule_step
from engram_store.optimizers.kernels import apply_update
from engram_store.optimizers.reference import narrow, widen
from engram_store.types import HyperParameters, OptimizerKind, RowDtype, TableSpec


@pytest.mark.parametrize("dim", [1, 7, 16, 64, 80])
@pytest.mark.parametrize("dtype", list(RowDtype))
@pytest.mark.parametrize("kind", list(OptimizerKind))
@pytest.mark.parametrize("stochastic", [True, False])
def test_kernel_equals_reference_bit_for_bit(
    dim: int, dtype: RowDtype, kind: OptimizerKind, stochastic: bool
) -> None:
    """Rows and state of every rule, dtype and rounding are those of plain numpy."""
    spec = TableSpec(
        layer=3, rows=10**6, dim=dim, dtype=dtype, optimizer=kind, stochastic_rounding=stochastic
    )
    rng = np.random.default_rng(dim)
    n = 50
    rows = rng.choice(spec.rows, n, replace=False).astype(np.int32)
    old = narrow(rng.standard_normal((n, dim), np.float32), dtype)
    state = rng.random((n, spec.state_width), np.float32)
    gradients = rng.standard_normal((n, dim), np.float32)
    step = rule_step(spec, 5, HyperParameters(lr=0.1, gradient_scale=0.7))

    new, new_state = np.empty_like(old), np.empty_like(state)
    apply_update(spec, step, rows, old, state, gradients, new, new_state)
    expected, expected_state = apply_reference(spec, step, rows, old, state, gradients)

    assert new.tobytes() == expected.tobytes()
    if kind is not OptimizerKind.SGD:
        assert new_state.tobytes() == expected_state.tobytes()


@pytest.mark.parametrize("stochastic", [True, False])
def test_bfloat16_rows_keep_nan_and_infinity(stochastic: bool) -> None:
    """Accepted NaN and infinite gradients stay NaN and infinite instead of wrapping around."""
    spec = TableSpec(
        layer=1, rows=8, dim=4, optimizer=OptimizerKind.SGD, stochastic_rounding=stochastic
    )
    nan_bits = np.uint32(0x7FFFFFFF).view(np.float32)
    gradients = np.array([[np.inf, -np.inf, nan_bits, 0]], np.float32)
    old = np.zeros((1, 4), np.uint16)
    new = np.empty_like(old)
    none = np.empty((1, 0), np.float32)
    step = rule_step(spec, 0, HyperParameters(lr=1.0))

    apply_update(spec, step, np.zeros(1, np.int32), old, none, gradients, new, none)

    np.testing.assert_array_equal(widen(new)[0], [-np.inf, np.inf, np.nan, 0])


def test_stochastic_rounding_is_unbiased() -> None:
    """A quarter of the way between two bfloat16 values rounds up a quarter of the time."""
    spec = TableSpec(layer=1, rows=10**5, dim=16, optimizer=OptimizerKind.SGD)
    n = 20_000
    old = np.full((n, 16), 0x3F80, np.uint16)
    gradients = np.full((n, 16), -(2.0**-7) / 4, np.float32)
    new = np.empty_like(old)
    none = np.empty((n, 0), np.float32)
    step = rule_step(spec, 0, HyperParameters(lr=1.0))

    apply_update(spec, step, np.arange(n, dtype=np.int32), old, none, gradients, new, none)

    share = (new == 0x3F81).mean()
    assert set(np.unique(new)) == {0x3F80, 0x3F81}
    assert abs(share - 0.25) < 5 * np.sqrt(0.25 * 0.75 / new.size)
    per_element = (new == 0x3F81).mean(axis=0)
    assert np.abs(per_element - 0.25).max() < 5 * np.sqrt(0.25 * 0.75 / n)
