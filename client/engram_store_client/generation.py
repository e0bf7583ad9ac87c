"""Looks one token ahead while a model generates."""
# ruff: noqa: ARG002 - `generate` calls a criterion with all of its arguments

from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

from engram_store_client.passes import Reader


class NextTokenLookAhead(StoppingCriteria):
    """Announces each token as soon as it was chosen; `Memory.next_token` makes it.

    `generate` asks its stopping criteria right after it has chosen a token, and prepares the next
    forward pass afterwards: rows are fetched meanwhile. This one never stops anything. With beams
    the sequences change their order after it was asked, so that its windows are given back unused.

    Args:
        reader: the memory's.
    """

    def __init__(self, reader: Reader) -> None:
        self._reader = reader

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """Go on.

        Args:
            input_ids: [batch, tokens so far].

        Returns:
            Bool [batch], all False.
        """
        self._reader.announce_next(input_ids[:, -1:])
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
