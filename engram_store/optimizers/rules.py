"""The scalars of one optimiser step, worked out once per commit and table."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engram_store.types import HyperParameters, OptimizerKind, RowIds, TableSpec

_DEFAULT_EPS = {
    OptimizerKind.SGD: 0.0,
    OptimizerKind.ROWWISE_ADAGRAD: 1e-8,
    OptimizerKind.ADAGRAD: 1e-10,
    OptimizerKind.ADAM: 1e-8,
}
_MASK64 = 2**64 - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """What a rule needs besides rows, state and gradients; float32 as the kernels see it."""

    scale: np.float32
    """Factor on every gradient."""
    rate: np.float32
    """Learning rate; for Adam with both bias corrections in it."""
    eps: np.float32
    decay1: np.float32
    """1 - beta1."""
    decay2: np.float32
    """1 - beta2."""
    seed: np.uint64
    """Seed of stochastic rounding for this table and step (`commit_seed`)."""


def rule_step(spec: TableSpec, step: int, hyper: HyperParameters) -> Step:
    """Scalars for step number `step` (from 0).

    Source of Adam's: Kingma and Ba (2015), section 2, with eps outside the corrected root as in
    `torch.optim.SparseAdam`: rate = lr * sqrt(1 - beta2^t) / (1 - beta1^t), t = step + 1.
    """
    rate = hyper.lr
    if spec.optimizer is OptimizerKind.ADAM:
        t = step + 1
        rate *= math.sqrt(1 - hyper.beta2**t) / (1 - hyper.beta1**t)
    eps = _DEFAULT_EPS[spec.optimizer] if hyper.eps is None else hyper.eps
    return Step(
        scale=np.float32(hyper.gradient_scale),
        rate=np.float32(rate),
        eps=np.float32(eps),
        decay1=np.float32(1 - hyper.beta1),
        decay2=np.float32(1 - hyper.beta2),
        seed=commit_seed(spec, step),
    )


def _mix64(value: int) -> int:
    """Finaliser of splitmix64 (Steele, Lea, Flood 2014): every input bit reaches every output."""
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _MASK64
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _MASK64
    return value ^ (value >> 31)


def commit_seed(spec: TableSpec, step: int) -> np.uint64:
    """uint64 hash of (seed, table, step): the counter under stochastic rounding."""
    mixed = _mix64((spec.seed + 0x9E3779B97F4A7C15) & _MASK64)
    mixed = _mix64((mixed + 0x9E3779B97F4A7C15 * (spec.layer + 1)) & _MASK64)
    return np.uint64(_mix64((mixed + 0x9E3779B97F4A7C15 * (step + 1)) & _MASK64))


def row_seeds(seed: np.uint64, rows: RowIds) -> NDArray[np.uint32]:
    """uint32 [n] seed of each row in this step; the kernels compute the same inline."""
    mixed = seed ^ (rows.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    mixed = (mixed ^ (mixed >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
    return (mixed >> np.uint64(32)).astype(np.uint32)
