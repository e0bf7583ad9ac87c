"""The gate of the DeepSeek-V4.1 checkpoints."""

import math

import torch
from torch import Tensor, nn

from engram_store_client.gates.base import Gate
from engram_store_client.gates.config import GateConfig
from engram_store_client.gates.parts import ConvCarry, Projection, masked, signed_sqrt_sigmoid

_EPS = 1e-6


class DeepSeekV41Gate(Gate):
    """One fused projection, norm weights that only appear as a product, no convolution.

    Source: the public serving code of DeepSeek-V4.1 (sglang 0.5.23). All arithmetic after the
    projection is fp32. The first M * D outputs of the projection are the keys, stream-major;
    the last D are the value.
    """

    def __init__(self, config: GateConfig) -> None:
        super().__init__(config)
        streams, size = config.streams, config.hidden_size
        self.eps = _EPS if config.norm_eps is None else config.norm_eps
        self.key_value = Projection(config.row_width, (streams + 1) * size, bias=False)
        self.query_weight = nn.Parameter(torch.ones(streams, size))
        self.key_weight = nn.Parameter(torch.ones(streams, size))
        self.initialise()

    def zero_value(self) -> None:
        """See `Gate`."""
        with torch.no_grad():
            self.key_value.weight[self.config.streams * self.config.hidden_size :] = 0

    def residual(
        self,
        rows: Tensor,
        streams: Tensor,
        mask: Tensor | None,
        carry: ConvCarry | None,  # noqa: ARG002 - nothing to carry without a convolution
    ) -> Tensor:
        """See `Gate`; the result is fp32."""
        count, size = self.config.streams, self.config.hidden_size
        projected = self.key_value(rows).float()
        key = projected[..., : count * size].reshape(streams.shape)
        value = projected[..., count * size :].unsqueeze(-2)
        gate = signed_sqrt_sigmoid(self._score(key, streams.float()), zero_is_positive=True)
        return masked(gate.unsqueeze(-1) * value, mask)

    def _score(self, key: Tensor, hidden: Tensor) -> Tensor:
        """Normalised, weighted dot product: two [B, T, M, D] -> [B, T, M]."""
        weight = self.query_weight.float() * self.key_weight.float()
        dot = (hidden * weight * key).sum(-1)
        norms = torch.rsqrt(hidden.square().mean(-1) + self.eps)
        norms = norms * torch.rsqrt(key.square().mean(-1) + self.eps)
        return dot * norms / math.sqrt(self.config.hidden_size)
