"""What every gate offers."""

from abc import abstractmethod

from torch import Tensor, nn

from engram_store.errors import ShapeError
from engram_store_client.gates.config import GateConfig
from engram_store_client.gates.parts import ConvCarry, split_streams


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

    @abstractmethod
    def residual(
        self, rows: Tensor, streams: Tensor, mask: Tensor | None, carry: ConvCarry | None
    ) -> Tensor:
        """`forward` for hidden states as streams [B, T, M, D]; returns the same shape."""
