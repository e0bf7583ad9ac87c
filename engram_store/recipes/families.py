"""The published families, each described by the few rules in which they differ."""

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

import numpy as np

NO_TOKEN: Final = int(np.iinfo(np.int64).min)
"""Marks a position of a context that lies before the start of its sequence."""


class Family(enum.StrEnum):
    """Which published arithmetic turns tokens into rows."""

    ENGRAM = "engram"
    """Paper and official demo (arXiv:2601.07372); Megatron-LM and TinyEngram hash alike."""
    ENGRAM_PEFT = "engram-peft"
    """The engram-peft library, 1.2.4 to 1.2.7."""
    DEEPSEEK_V41 = "deepseek-v4.1"
    """The DeepSeek-V4.1 checkpoints."""
    QWEN_PLE = "qwen3.8-ple"
    """The per-layer embedding of Qwen3.8-Flash-Next (transformers: `qwen4_exp`)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rules:
    """What sets one family's hash apart. Nothing else in the code asks for the family."""

    compresses: bool = True
    """Ids pass through a token map before they are hashed."""
    oldest_first: bool = False
    """Multiplier 0 belongs to the oldest token of the longest n-gram, not to the current
    token, so n-grams of lower orders end before the current token."""
    skips_orders: bool = False
    """Orders may be any increasing numbers instead of 2, 3, ... up to the highest."""
    keeps_large_ids: bool = False
    """Ids beyond the token map are hashed as they are; otherwise they are an error."""
    keeps_negative_ids: bool = False
    """Negative ids (such as the label -100) are hashed as they are instead of refused."""
    separator_hides_itself: bool = False
    """A separator reads as the filler even in its own n-gram, which then sees nothing. If not,
    it only hides what lies behind it."""
    masks_padding: bool = False
    """Tokens that an attention mask switches off become separators before hashing."""


RULES: Final[Mapping[Family, Rules]] = MappingProxyType(
    {
        Family.ENGRAM: Rules(keeps_negative_ids=True),
        Family.ENGRAM_PEFT: Rules(
            oldest_first=True, skips_orders=True, keeps_large_ids=True, keeps_negative_ids=True
        ),
        Family.DEEPSEEK_V41: Rules(separator_hides_itself=True),
        Family.QWEN_PLE: Rules(compresses=False, masks_padding=True),
    }
)
