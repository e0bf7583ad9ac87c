"""The pieces that published gates share.

Axes: B batch, T time, M residual streams, D hidden size, E values per token of the looked-up
rows (heads x row dim).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own convention

from engram_store.errors import ShapeError

_SMALLEST_SCORE = 1e-6


def split_streams(hidden: Tensor, streams: int, hidden_size: int) -> Tensor:
    """View hidden states as [B, T, M, D].

    Args:
        hidden: [B, T, M, D], or [B, T, D] when there is one stream.
        streams: M.
        hidden_size: D.

    Raises:
        ShapeError: neither of the two.
    """
    if hidden.ndim == 3 and streams == 1:
        hidden = hidden.unsqueeze(2)
    if hidden.ndim != 4 or hidden.shape[2:] != (streams, hidden_size):
        allowed = f"[batch, time, {streams}, {hidden_size}]"
        if streams == 1:
            allowed += f" or [batch, time, {hidden_size}]"
        raise ShapeError("hidden states", hidden.shape, allowed)
    return hidden


def signed_sqrt_sigmoid(score: Tensor, *, zero_is_positive: bool = False) -> Tensor:
    """The gate's activation: sigmoid(sign(s) * sqrt(max(|s|, 1e-6))).

    Source: the official Engram demo; the paper's equation (4) shows the plain sigmoid.

    Args:
        score: any shape.
        zero_is_positive: what the sign of 0 is: False gives sigmoid(0) as in the demo, True
            sigmoid(0.001) as in DeepSeek-V4.1 (the sign bit decides there, also for -0.0).
    """
    root = score.abs().clamp_min(_SMALLEST_SCORE).sqrt()
    signed = torch.copysign(root, score) if zero_is_positive else root * score.sign()
    return torch.sigmoid(signed)


class Projection(nn.Module):
    """A linear map, started as `torch.nn.Linear` is.

    It is no `nn.Linear`, so that nothing that goes by that type (LoRA on all linear layers,
    quantisation) takes it for one of the model's. For the same reason its bias has another name:
    peft saves all that are called `bias` when it trains biases.
    """

    def __init__(self, width: int, size: int, *, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, width))
        self.linear_bias = nn.Parameter(torch.empty(size)) if bias else None
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.linear_bias is not None:
            nn.init.uniform_(self.linear_bias, -1 / math.sqrt(width), 1 / math.sqrt(width))

    def forward(self, rows: Tensor) -> Tensor:
        """[..., width] -> [..., size]."""
        return F.linear(rows, self.weight, self.linear_bias)


class StreamNorm(nn.Module):
    """RMSNorm over D with one weight vector per stream."""

    def __init__(
        self, streams: int, hidden_size: int, eps: float | None, *, unit_offset: bool = False
    ) -> None:
        """`eps` of None is the input dtype's machine epsilon, as `torch.nn.RMSNorm` has it.

        With `unit_offset` the factor is 1 + weight, computed in fp32.
        """
        super().__init__()
        self.eps, self.unit_offset = eps, unit_offset
        self.weight = nn.Parameter(torch.empty(streams, hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start as a plain normalisation."""
        nn.init.constant_(self.weight, 0.0 if self.unit_offset else 1.0)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [B, T, M, D]; dtype and shape stay."""
        if self.unit_offset:
            normed = F.rms_norm(x.float(), x.shape[-1:], eps=self.eps)
            return (normed * (1.0 + self.weight.float())).type_as(x)
        return F.rms_norm(x, x.shape[-1:], eps=self.eps) * self.weight


class GatedValue(nn.Module):
    """Keys per stream and a shared value from the rows; every stream gates the value.

    Source: Engram paper (arXiv:2601.07372), section 2.3. The per-stream key projections of the
    demo are one matrix here, stream-major.
    """

    def __init__(
        self,
        *,
        row_width: int,
        streams: int,
        hidden_size: int,
        bias: bool,
        eps: float | None,
        unit_offset: bool = False,
    ) -> None:
        super().__init__()
        self.streams, self.hidden_size = streams, hidden_size
        self.key = Projection(row_width, streams * hidden_size, bias=bias)
        self.value = Projection(row_width, hidden_size, bias=bias)
        self.key_norm = StreamNorm(streams, hidden_size, eps, unit_offset=unit_offset)
        self.query_norm = StreamNorm(streams, hidden_size, eps, unit_offset=unit_offset)

    def zero_value(self) -> None:
        """Make the gated value zero whatever the rows are."""
        for parameter in self.value.parameters():
            nn.init.zeros_(parameter)

    def gates(self, rows: Tensor, hidden: Tensor) -> Tensor:
        """How far each stream opens: rows [B, T, E], hidden [B, T, M, D] -> [B, T, M]."""
        key = self.key(rows).view(*rows.shape[:-1], self.streams, self.hidden_size)
        score = (self.key_norm(key) * self.query_norm(hidden)).sum(-1)
        return signed_sqrt_sigmoid(score / math.sqrt(self.hidden_size))

    def forward(self, rows: Tensor, hidden: Tensor, mask: Tensor | None) -> Tensor:
        """Rows [B, T, E], hidden [B, T, M, D], mask [B, T] -> gated value [B, T, M, D]."""
        gated = self.gates(rows, hidden).unsqueeze(-1) * self.value(rows).unsqueeze(-2)
        return masked(gated, mask)


def masked(gated: Tensor, mask: Tensor | None) -> Tensor:
    """Zero [B, T, M, D] where mask [B, T] is 0; None masks nothing."""
    return gated if mask is None else gated * mask[..., None, None].to(gated.dtype)


@dataclass(eq=False)
class ConvCarry:
    """What a convolution remembers between two chunks of the same sequences."""

    past: Tensor | None = None
    """[B, M * D, reach], the newest inputs; None before the first chunk."""

    def select(self, indices: Tensor) -> None:
        """Reorder, repeat or drop sequences: entry i continues sequence `indices[i]`."""
        if self.past is not None:
            self.past = self.past.index_select(0, indices.to(self.past.device))


class ShortConv(nn.Module):
    """Norm, causal depthwise convolution with dilation, SiLU.

    output[t] = sum over j of weight[j] * x[t - (kernel_size - 1 - j) * dilation], with zeros
    before the first token. Source: Engram paper, equation (5).
    """

    def __init__(
        self,
        *,
        streams: int,
        hidden_size: int,
        kernel_size: int,
        dilation: int,
        eps: float,
        unit_offset: bool = False,
    ) -> None:
        super().__init__()
        self.streams, self.hidden_size, self.dilation = streams, hidden_size, dilation
        self.reach = (kernel_size - 1) * dilation
        """How many earlier tokens an output sees."""
        self.norm = StreamNorm(streams, hidden_size, eps, unit_offset=unit_offset)
        self.weight = nn.Parameter(torch.empty(streams * hidden_size, 1, kernel_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Zero, as the paper trains it: the branch starts as the identity."""
        nn.init.zeros_(self.weight)

    def forward(self, gated: Tensor, carry: ConvCarry | None = None) -> Tensor:
        """Mix [B, T, M, D] along time; with `carry` the input continues earlier chunks."""
        x = self.norm(gated).flatten(-2).transpose(1, 2)
        if carry is None or carry.past is None:
            x = F.pad(x, (self.reach, 0))
        else:
            x = torch.cat((carry.past.to(x.dtype), x), dim=-1)
        if carry is not None:
            carry.past = x[..., x.shape[-1] - self.reach :].detach().clone()
        mixed = F.conv1d(x, self.weight, dilation=self.dilation, groups=self.weight.shape[0])
        return F.silu(mixed).transpose(1, 2).reshape(gated.shape)
