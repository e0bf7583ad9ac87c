"""The gate of Qwen3.8-Flash-Next's per-layer embeddings (PLE)."""

from torch import Tensor

from engram_store_client.gates.base import Gate
from engram_store_client.gates.config import GateConfig
from engram_store_client.gates.parts import ConvCarry, GatedValue, ShortConv

_EPS = 1e-6


class QwenPleGate(Gate):
    """The paper's gate with norms of factor 1 + weight, one epsilon, and no biases.

    Source: transformers 5.23.0, `qwen4_exp`. Its flat hidden states [B, T, M * D] are
    [B, T, M, D] here.
    """

    def __init__(self, config: GateConfig) -> None:
        super().__init__(config)
        eps = _EPS if config.norm_eps is None else config.norm_eps
        self.gated = GatedValue(
            row_width=config.row_width,
            streams=config.streams,
            hidden_size=config.hidden_size,
            bias=False,
            eps=eps,
            unit_offset=True,
        )
        self.conv = ShortConv(
            streams=config.streams,
            hidden_size=config.hidden_size,
            kernel_size=config.kernel_size,
            dilation=config.dilation,
            eps=eps,
            unit_offset=True,
        )
        self.initialise()

    def zero_value(self) -> None:
        """See `Gate`."""
        self.gated.zero_value()

    def residual(
        self, rows: Tensor, streams: Tensor, mask: Tensor | None, carry: ConvCarry | None
    ) -> Tensor:
        """See `Gate`."""
        gated: Tensor = self.gated(rows, streams, mask)
        mixed: Tensor = self.conv(gated, carry)
        return gated + mixed
