"""What the examples share: text as sequences of ids, and a toy model for `--toy`."""

from collections.abc import Mapping
from pathlib import Path
from pydoc_data.topics import topics  # what help() says about Python: text on any machine
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, TrainingArguments

QWEN3_4B = Qwen3Config(
    vocab_size=151_936,
    hidden_size=2560,
    intermediate_size=9728,
    num_hidden_layers=36,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    tie_word_embeddings=True,
    use_cache=False,
)
TOY = Qwen3Config(
    vocab_size=512,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    tie_word_embeddings=True,
    use_cache=False,
    pad_token_id=0,
    eos_token_id=1,
    bos_token_id=None,
)

_NAME = "activation_checkpointing"  # since transformers 5.23; gradient_checkpointing before
_NAME = _NAME if hasattr(TrainingArguments, _NAME) else "gradient_checkpointing"
CHECKPOINTING: dict[str, Any] = {_NAME: True, f"{_NAME}_kwargs": {"use_reentrant": False}}


def own_text() -> str:
    """Half a megabyte of prose that comes with Python."""
    return "\n\n".join(topics.values())


def own_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """A tokenizer of 512 tokens, trained on a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<pad>", "<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text[:100_000]], trainer)
    ends = {"pad_token": "<pad>", "eos_token": "<end>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **ends)


def sequences(tokenizer: Any, text: str, time: int) -> list[dict[str, torch.Tensor]]:
    """A text cut into sequences of `time` ids; every id is also a label."""
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    whole = ids[: len(ids) // time * time].view(-1, time)
    return [{"input_ids": line, "labels": line} for line in whole]


def to_device(batch: Mapping[str, Any], device: str) -> dict[str, Any]:
    """A batch whose tensors are on a device; the ticket that `look_ahead` adds stays as it is."""
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}


def save_toy(directory: Path) -> tuple[Path, Path]:
    """A model directory (config and tokenizer, no weights) and a text file, for files and tests."""
    own_tokenizer(own_text()).save_pretrained(directory / "model")
    TOY.save_pretrained(directory / "model")
    (directory / "text.txt").write_text(own_text()[:60_000], encoding="utf-8")
    return directory / "model", directory / "text.txt"
