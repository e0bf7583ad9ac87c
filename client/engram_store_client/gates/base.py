"""What every gate offers."""

import math
from abc import abstractmethod

from torch import Tensor, nn

from engram_store.errors import ShapeError
from engram_store_client.gates.config import GateConfig, GateInit
from engram_store_client.gates.parts import ConvCarry, Projection, ShortConv, split_streams

_QWEN_STD = 0.02
"""`initializer_range` of transformers' qwen4_exp."""


class Gate(nn.Module):
    """Turns the rows of a token and its hidden state into what is added to that state."""

    def __init__(self, config: GateConfig) -> None:
        super().__init__()
        self.config = config

    def forward(
        self,
        rows: Tensor,
        hidden: Tensor,
        *,
        mask: Tensor | None = None,
        carry: ConvCarry | None = None,
    ) -> Tensor:
        """Compute the residual, without adding it.

        Args:
            rows: [B, T, row_width], the looked-up rows of all heads side by side.
            hidden: [B, T, streams, hidden_size], or [B, T, hidden_size] for one stream.
            mask: [B, T], 0 where the gate stays shut: padding, image tokens.
            carry: where earlier chunks of the same sequences left off; updated.

        Returns:
            Shape of `hidden`, dtype of the gate's arithmetic.

        Raises:
            ShapeError: rows or hidden states do not fit the configuration.
        """
        if rows.ndim != 3 or rows.shape[-1] != self.config.row_width:
            expected = f"[batch, time, {self.config.row_width}]"
            raise ShapeError("looked-up rows", rows.shape, expected)
        if hidden.shape[:2] != rows.shape[:2]:
            raise ShapeError(
                "hidden states", hidden.shape, f"[{rows.shape[0]}, {rows.shape[1]}, ...]"
            )
        return self.residual(rows, self.streams_of(hidden), mask, carry).reshape(hidden.shape)

    def streams_of(self, hidden: Tensor) -> Tensor:
        """View hidden states as [B, T, M, D]. Raises: ShapeError."""
        return split_streams(hidden, self.config.streams, self.config.hidden_size)

    def initialise(self) -> None:
        """Start the parameters as the configuration says; subclasses call it once they are made."""
        for module in self.modules():
            if isinstance(module, ShortConv) and self.config.init is GateInit.DEMO:
                nn.init.kaiming_uniform_(module.weight, a=math.sqrt(5))  # torch's Conv1d
            if isinstance(module, Projection) and self.config.init is GateInit.QWEN_PLE:
                nn.init.normal_(module.weight, std=_QWEN_STD)
        if self.config.identity_init:
            self.zero_value()

    @abstractmethod
    def zero_value(self) -> None:
        """Make the gated value zero whatever the rows are."""

    @abstractmethod
    def residual(
        self, rows: Tensor, streams: Tensor, mask: Tensor | None, carry: ConvCarry | None
    ) -> Tensor:
        """`forward` for hidden states as streams [B, T, M, D]; returns the same shape."""
