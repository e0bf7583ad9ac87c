"""Checks of the sparse update rules against torch's optimisers."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram_store.conformance.comparison import Comparison, Subject
from engram_store.conformance.tensors import read_metadata, read_tensors
from engram_store.optimizers import apply_reference, rule_step
from engram_store.types import HyperParameters, OptimizerKind, RowDtype, TableSpec

Tensors = Mapping[str, NDArray[Any]]

_RULES = {
    "sgd": OptimizerKind.SGD,
    "adagrad": OptimizerKind.ADAGRAD,
    "sparse_adam": OptimizerKind.ADAM,
    "adam_dense": OptimizerKind.ADAM,
}
"""Our rule for each of the file's optimisers. Dense Adam is ours with a gradient for every row."""
_STATE = {
    "adagrad": ("sum",),
    "sparse_adam": ("exp_avg", "exp_avg_sq"),
    "adam_dense": ("exp_avg", "exp_avg_sq"),
}
_NUMBER = r"([0-9.e+-]+)"


def check_sparse_optim(path: Path) -> Iterator[Comparison]:
    """Sums of gradients by row, tables after each step, final state (kind "sparse_optim")."""
    tensors, settings = read_tensors(path), read_metadata(path)
    subject = Subject("sparse_optim", path.name)
    sums = list(_summed(tensors))
    for step, (rows, gradients) in enumerate(sums):
        prefix = f"mid.step{step}."
        yield subject.exact(f"{prefix}unique_rows", rows, tensors[f"{prefix}unique_rows"])
        yield subject.close(f"{prefix}summed_grads", gradients, tensors[f"{prefix}summed_grads"])
    for name in _names(tensors):
        hyper = _hyper_parameters(settings[name])
        updates = sums
        if name.endswith("_dense"):
            updates = [_spread_out(update, tensors["in.table"]) for update in sums]
        yield from _check_rule(subject.part(name), name, hyper, updates, tensors)


def _check_rule(
    subject: Subject,
    name: str,
    hyper: HyperParameters,
    updates: list[tuple[NDArray[Any], NDArray[np.float32]]],
    tensors: Tensors,
) -> Iterator[Comparison]:
    """One optimiser, step by step."""
    table = tensors["in.table"].copy()
    spec = TableSpec(
        layer=0,
        rows=len(table),
        dim=table.shape[1],
        dtype=RowDtype.FLOAT32,
        optimizer=_RULES[name],
    )
    state = np.zeros((spec.rows, spec.state_width), np.float32)
    for step, (rows, gradients) in enumerate(updates):
        scalars = rule_step(spec, step, hyper)
        ids = rows.astype(np.int32)
        table[rows], state[rows] = apply_reference(
            spec, scalars, ids, table[rows], state[rows], gradients
        )
        yield subject.close(f"step{step}.table", table, tensors[f"out.{name}.step{step}.table"])
    parts = _STATE.get(name, ())
    for part, values in zip(parts, np.split(state, max(1, len(parts)), axis=1), strict=False):
        yield subject.close(f"state.{part}", values, tensors[f"out.{name}.state.{part}"])


def _summed(tensors: Tensors) -> Iterator[tuple[NDArray[Any], NDArray[np.float32]]]:
    """Distinct rows of each step, ascending, and the sums of their gradients."""
    step = 0
    while f"in.step{step}.rows" in tensors:
        rows, inverse = np.unique(tensors[f"in.step{step}.rows"], return_inverse=True)
        gradients = tensors[f"in.step{step}.grads"]
        sums = np.zeros((len(rows), gradients.shape[1]), np.float32)
        np.add.at(sums, inverse, gradients)
        yield rows, sums
        step += 1


def _spread_out(
    update: tuple[NDArray[Any], NDArray[np.float32]], table: NDArray[np.float32]
) -> tuple[NDArray[Any], NDArray[np.float32]]:
    """The same update with a gradient, mostly zero, for every row."""
    rows, gradients = update
    everywhere = np.zeros_like(table)
    everywhere[rows] = gradients
    return np.arange(len(table)), everywhere


def _names(tensors: Tensors) -> list[str]:
    """The optimisers that a file has results of."""
    return sorted({key.split(".")[1] for key in tensors if key.startswith("out.")})


def _hyper_parameters(text: str) -> HyperParameters:
    """Hyper-parameters from a text such as "lr=2e-3 betas=(0.9,0.999) eps=1e-8"."""

    def find(pattern: str) -> list[float]:
        found = re.search(pattern, text)
        return [float(number) for number in found.groups()] if found else []

    values = dict(zip(("beta1", "beta2"), find(rf"betas=\({_NUMBER}, *{_NUMBER}\)"), strict=False))
    eps = find(f"eps={_NUMBER}")
    return HyperParameters(lr=find(f"lr={_NUMBER}")[0], eps=eps[0] if eps else None, **values)
