"""The model that `bench train` trains: a small decoder, the same for every line.

Needs torch and the client. Rows come in before the second block, as `attach` does it.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own convention

from engram_store.bench.train_place import BLOCKS, HIDDEN, VOCABULARY, TrainPlace

_HEAD_DIM = 32
_SEED = 0


class _Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self) -> None:
        super().__init__()
        self.mixed = nn.Linear(HIDDEN, 3 * HIDDEN, bias=False)
        self.out = nn.Linear(HIDDEN, HIDDEN, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        batch, time, _ = hidden.shape
        mixed = self.mixed(hidden).view(batch, time, 3, -1, _HEAD_DIM)
        query, key, value = mixed.permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        projected: Tensor = self.out(seen.transpose(1, 2).reshape(batch, time, HIDDEN))
        return projected


class _Block(nn.Module):
    """A decoder block; the client finds it by its `self_attn`."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn, self.before = _Attention(), nn.RMSNorm(HIDDEN)
        self.between = nn.RMSNorm(HIDDEN)
        self.mlp = nn.Sequential(
            nn.Linear(HIDDEN, 4 * HIDDEN), nn.GELU(), nn.Linear(4 * HIDDEN, HIDDEN)
        )

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        seen: Tensor = hidden_states + self.self_attn(self.before(hidden_states))
        hidden: Tensor = seen + self.mlp(self.between(seen))
        return hidden


class _Decoder(nn.Module):
    """Embedding and blocks: what the client's hooks are put on."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCABULARY, HIDDEN)
        self.layers = nn.ModuleList(_Block() for _ in range(BLOCKS))
        self.narrow: Tensor

    def forward(self, input_ids: Tensor) -> Tensor:
        """Text ids int64 [B, T] -> [B, T, D]."""
        hidden: Tensor = self.embed_tokens(self.narrow[input_ids])
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


class TinyModel(nn.Module):
    """A decoder-only language model that returns its loss. Weights are always the same at first.

    Args:
        place: whose text it learns.
    """

    def __init__(self, place: TrainPlace) -> None:
        super().__init__()
        torch.manual_seed(_SEED)
        self.backbone = _Decoder()
        self.backbone.register_buffer("narrow", torch.from_numpy(place.narrow))
        self.norm = nn.RMSNorm(HIDDEN)
        self.head = nn.Linear(HIDDEN, VOCABULARY, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Mean cross entropy of the next token of int64 [B, T]."""
        logits = self.head(self.norm(self.backbone(input_ids)))[:, :-1]
        wanted = self.backbone.narrow[input_ids[:, 1:]]
        return F.cross_entropy(logits.flatten(0, 1), wanted.flatten())
