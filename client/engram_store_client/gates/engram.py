"""The gate of the Engram paper and its official demo."""

from torch import Tensor

from engram_store_client.gates.base import Gate
from engram_store_client.gates.config import GateConfig
from engram_store_client.gates.parts import ConvCarry, GatedValue, ShortConv

_CONV_EPS = 1e-5


class EngramGate(Gate):
    """y = u + SiLU(conv(norm(u))) with u = gate * value.

    Source: Engram paper (arXiv:2601.07372), section 2.3, and the arithmetic of the official
    demo: norms of keys and queries use the dtype's machine epsilon. How it starts: `GateInit`.
    """

    def __init__(self, config: GateConfig) -> None:
        super().__init__(config)
        self.gated = GatedValue(
            row_width=config.row_width,
            streams=config.streams,
            hidden_size=config.hidden_size,
            bias=config.bias,
            eps=config.norm_eps,
        )
        self.conv: ShortConv | None = None
        if config.conv:
            self.conv = ShortConv(
                streams=config.streams,
                hidden_size=config.hidden_size,
                kernel_size=config.kernel_size,
                dilation=config.dilation,
                eps=_CONV_EPS,
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
        return gated if self.conv is None else gated + self.conv(gated, carry)
