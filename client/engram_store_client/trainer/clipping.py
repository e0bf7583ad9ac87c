"""Table gradients in a Trainer's clipping: one norm and one coefficient for all gradients.

A Trainer clips by `accelerator.clip_grad_norm_(model.parameters(), ...)`, between the last
backward pass and its first callback event. So the model gets a parameter of two elements whose
`grad` is made when somebody reads it: the norm of the table gradients, which counts towards the
norm of all, and a number that comes back multiplied by the coefficient.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn

from engram_store.errors import NonFiniteGradientError
from engram_store_client.windows import OpenWindows

SUBMODULE = "engram_clipping"
"""Under this name, and that of the memory, the parameter is in a model that a Trainer trains."""
_UNIT = 2.0**-64
"""A power of two, so that the coefficient comes back exactly; its square is lost in any sum."""


class _Norm(nn.Parameter):
    """A frozen parameter without a value. Nobody trains it, and no checkpoint has it."""

    source: "Callable[[], Tensor | None] | None" = None

    @property
    def grad(self) -> Tensor | None:
        return None if self.source is None else self.source()

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        """Gradients are set to None, between steps; this one is gone by then."""


class _Holder(nn.Module):
    """Keeps the parameter out of every state dict."""

    def __init__(self, source: Callable[[], Tensor | None]) -> None:
        super().__init__()
        norm = _Norm(torch.zeros(2), requires_grad=False)
        norm.source = source
        self.norm = norm

    def _save_to_state_dict(self, *_: Any) -> None:
        pass

    def _load_from_state_dict(self, *_: Any) -> None:
        pass


@dataclass(frozen=True, slots=True)
class Clipped:
    """What became of a step's gradients."""

    norm: float
    """Of the table gradients, before clipping; not finite: an overflow."""
    coefficient: float | None
    """That all gradients were multiplied by; None: nobody clipped."""
    loss_scale: float
    """That table gradients still carry."""


class TableClipping:
    """Lends a model the parameter while a Trainer trains it.

    Args:
        name: of the memory.
        windows: whose gradients.
        model: gets the parameter.
        may_read: whether the step's gradients are complete, as far as the loop knows.
    """

    def __init__(
        self,
        name: str,
        windows: OpenWindows,
        model: nn.Module,
        may_read: Callable[[], bool],
    ) -> None:
        self._windows, self._model, self._may_read = windows, model, may_read
        self._module = f"{SUBMODULE}_{name.replace('.', '_')}"
        self._reading: Tensor | None = None
        self._norm, self._scale = 0.0, 1.0
        self._scaler: Any = None
        self._armed, self._note = False, ""
        self._holder = _Holder(self._read)
        model.add_module(self._module, self._holder)

    def belongs_to(self, model: nn.Module) -> bool:
        """Whether clipping that model's parameters clips the tables."""
        return any(parameter is self._holder.norm for parameter in model.parameters())

    def begin(self, scaler: Any, note: str) -> None:
        """The forward passes of a step begin.

        Args:
            scaler: of the loss, a `GradScaler`; None: there is none.
            note: what else to say if the step's gradients are refused.
        """
        self._note = note
        enabled = scaler is not None and scaler.is_enabled()
        self._scaler = scaler if enabled else None
        self._armed, self._reading, self._norm, self._scale = True, None, 0.0, 1.0

    def end(self) -> Clipped:
        """Gradients were clipped, if they are. Hands over what was not handed over yet.

        Raises: what `Window.push` raises.
        """
        reading = self._reading
        self._read()
        self._armed, self._reading = False, None
        coefficient = None if reading is None else float(reading[1]) / _UNIT
        return Clipped(self._norm, coefficient, self._scale)

    def remove(self) -> None:
        """Take the parameter out of the model."""
        self._armed = False
        if getattr(self._model, self._module, None) is self._holder:
            delattr(self._model, self._module)

    def _read(self) -> Tensor | None:
        """The gradient of the parameter: made once in a step."""
        if self._reading is None and self._armed and self._may_read():
            if self._scaler is not None:
                self._scale = float(self._scaler.get_scale())
            before = self._windows.guards().gradients_pushed
            self._norm = self._gradient_norm()
            reading = torch.tensor([self._norm, _UNIT])
            if self._windows.guards().gradients_pushed == before and self._norm == 0.0:
                return reading  # read before the backward pass: there is more to come
            self._reading = reading
        return self._reading

    def _gradient_norm(self) -> float:
        """Of the table gradients without the loss scale; infinite after an overflow."""
        try:
            self._windows.push()
        except NonFiniteGradientError as error:
            if self._scaler is None:
                error.add_note(self._note)
                raise
            return float("inf")
        norm = self._windows.gradient_norm() / self._scale
        return norm if isfinite(norm) or self._scaler is None else float("inf")


def mark_overflow(optimizer: Any, scaler: Any) -> None:
    """Let a loss scaler skip the step of an optimiser although its own gradients are finite.

    Args:
        optimizer: of Accelerate, or torch.
        scaler: a `GradScaler`.
    """
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    found: Mapping[Any, Tensor] = scaler._found_inf_per_device(optimizer)  # noqa: SLF001 - torch's own
    if not found:
        scaler.unscale_(optimizer)
        found = scaler._found_inf_per_device(optimizer)  # noqa: SLF001
    for flag in found.values():
        flag.fill_(1.0)
