"""Tokenizer, token sequences, and the small language model that is trained first."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own convention
from transformers import LlamaConfig, LlamaForCausalLM

from engram_store_client.demo.settings import Settings

PAD, END = 0, 1
"""Ids of the tokens that are no text."""
Sequences = NDArray[np.int64]
"""Token ids [sequences, time]."""
Batches = Iterable[dict[str, Tensor]]
OnStep = Callable[[int, float], None]
"""Called with (step, loss) after each step."""


def prepare_torch(settings: Settings) -> None:
    """Make results repeatable: the same sums in the same order."""
    torch.set_num_threads(settings.threads)
    torch.use_deterministic_algorithms(True)


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> Tokenizer:
    """A byte-level BPE tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<pad>", "<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: Sequence[str], time: int) -> Sequences:
    """Texts, one after the other, cut into sequences of equal length."""
    stream = [token for e in tokenizer.encode_batch(list(texts)) for token in (*e.ids, END)]
    whole = len(stream) // time * time
    return np.array(stream[:whole], np.int64).reshape(-1, time)


def training_batches(data: Sequences, settings: Settings, first: int, stop: int) -> Batches:
    """Batches of steps first...stop-1, in an order that the seed alone decides.

    So a run that is resumed in the middle sees the batches it would have seen.
    """
    order = np.random.default_rng(settings.seed).permutation(len(data))
    for step in range(first, stop):
        places = np.arange(step * settings.batch, (step + 1) * settings.batch)
        yield {"input_ids": torch.from_numpy(data[order.take(places, mode="wrap")])}


def schedule(step: int, steps: int) -> float:
    """Factor on every learning rate: a short warm-up, then a cosine down to a tenth."""
    warm_up = min(1.0, (step + 1) / 20)
    return float(warm_up * (0.55 + 0.45 * np.cos(np.pi * step / steps)))


def make_base(settings: Settings) -> LlamaForCausalLM:
    """A Llama with random weights."""
    torch.manual_seed(settings.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=settings.vocabulary,
            hidden_size=settings.hidden,
            intermediate_size=8 * settings.hidden // 3,
            num_hidden_layers=settings.blocks,
            num_attention_heads=settings.hidden // 32,
            num_key_value_heads=settings.hidden // 32,
            max_position_embeddings=settings.time,
            tie_word_embeddings=True,
            pad_token_id=PAD,
            bos_token_id=None,
            eos_token_id=END,
            use_cache=False,
        )
    )


def train_base(model: nn.Module, data: Sequences, settings: Settings, on_step: OnStep) -> None:
    """Train all parameters of a model."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.base_lr, betas=(0.9, 0.95))
    model.train()
    for step, batch in enumerate(training_batches(data, settings, 0, settings.base_steps)):
        set_rate(optimizer, settings.base_lr * schedule(step, settings.base_steps))
        loss = loss_of(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        on_step(step, loss.item())


def set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """One learning rate for all parameters."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    """Mean cross entropy of the next token."""
    logits = model(**batch).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten())


def evaluation_batches(data: Sequences, settings: Settings) -> Iterator[dict[str, Tensor]]:
    """Held-out sequences in order."""
    for start in range(0, min(len(data), settings.eval_sequences), settings.batch):
        part = data[start : start + settings.batch][: settings.eval_sequences - start]
        yield {"input_ids": torch.from_numpy(part)}


@torch.no_grad()
def perplexity(model: nn.Module, batches: Iterable[Any]) -> float:
    """Of the next token, over all tokens alike."""
    model.eval()
    losses, tokens = [], []
    for batch in batches:
        losses.append(loss_of(model, batch).item())
        tokens.append(batch["input_ids"][:, 1:].numel())
    return float(np.exp(np.average(losses, weights=tokens)))
