"""The gate of engram-peft."""

from torch import Tensor

from engram_store_client.gates.engram import EngramGate
from engram_store_client.gates.parts import ConvCarry


class EngramPeftGate(EngramGate):
    """The paper's gate without biases, with its branches on one residual stream.

    Source: engram-peft 1.2.4. Hidden states [B, T, D] are seen by every branch, and the
    branches are summed (not averaged); [B, T, M, D] works as in the paper.
    """

    def forward(
        self,
        rows: Tensor,
        hidden: Tensor,
        *,
        mask: Tensor | None = None,
        carry: ConvCarry | None = None,
    ) -> Tensor:
        """See `Gate`."""
        if hidden.ndim != 3:
            return super().forward(rows, hidden, mask=mask, carry=carry)
        branches = hidden.unsqueeze(2).expand(-1, -1, self.config.streams, -1)
        return super().forward(rows, branches, mask=mask, carry=carry).sum(dim=2)
