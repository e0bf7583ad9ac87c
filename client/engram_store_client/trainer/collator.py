"""A collator whose batches are announced to the store before the model sees them."""

import itertools
import os
import warnings
from collections.abc import Callable, MutableMapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from engram_store.errors import ConfigError, InputError
from engram_store_client.trainer.arrivals import Arrivals, Place
from engram_store_client.vocabulary import check_tokenizer
from engram_store_client.windows import checked_accumulation

if TYPE_CHECKING:
    from engram_store_client.memory import Memory

_IN_THIS_PROCESS: WeakValueDictionary[int, Arrivals] = WeakValueDictionary()
"""By key. Batches that come out of a worker process find the store's side here."""
_KEYS = itertools.count(1)
_TRAINING: ContextVar[bool | None] = ContextVar("training", default=None)
"""Whether the batch that is being made is trained; None: nobody knows."""


class Marker:
    """Puts the ticket of its window into a batch. Goes to worker processes without the store.

    Args:
        memory: whose windows.
    """

    def __init__(self, memory: "Memory") -> None:
        self.key = memory.ticket_key
        self._number = _number_of(memory)
        self._counted, self._process = 0, os.getpid()

    def mark(self, batch: MutableMapping[str, Any], *, training: bool | None) -> None:
        """Announce a batch and note its ticket; in a worker process, note what to announce.

        Raises: what `Session.announce` raises.
        """
        if training is None and _ranks() > 1:
            return  # its loader may deal one batch out to several ranks, tickets and all
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        mask = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
        worker = get_worker_info()
        if worker is None:
            batch[self.key] = _arrive(self._number, ids, mask, training, None)
            return
        if os.getpid() != self._process:
            self._counted, self._process = 0, os.getpid()
        place = Place(os.getpid(), worker.id, worker.num_workers, self._counted)
        self._counted += 1
        batch[self.key] = _Parcel((self._number, ids, mask, training, place))


class _Parcel:
    """What a worker process sends instead of a ticket: unpacked, it becomes one."""

    def __init__(self, content: tuple[Any, ...]) -> None:
        self._content = content

    def __reduce__(self) -> tuple[Any, ...]:
        return _arrive, self._content


def _arrive(
    number: int, ids: Any, mask: Any, training: bool | None, place: Place | None
) -> int | None:
    arrivals = _IN_THIS_PROCESS.get(number)
    return None if arrivals is None else arrivals.arrive(ids, mask, training=training, place=place)


def _number_of(memory: "Memory") -> int:
    """The key of a memory's arrivals, which all its collators and callbacks share."""
    arrivals = arrivals_of(memory)
    return next(number for number, known in _IN_THIS_PROCESS.items() if known is arrivals)


def arrivals_of(memory: "Memory") -> Arrivals:
    """What announces the batches of a memory; made when it is first asked for."""
    arrivals = memory.reader.windows.arrivals
    if arrivals is None:
        model = memory.model
        arrivals = Arrivals(memory.reader.windows, lambda: model.training)
        memory.reader.windows.arrivals = arrivals
        _IN_THIS_PROCESS[next(_KEYS)] = arrivals
    assert isinstance(arrivals, Arrivals)
    return arrivals


def _ranks() -> int:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if distributed else 1


class EngramCollator:
    """Makes batches with another collator, and announces them. `Memory.collator` makes it.

    Batches get one more entry, a ticket, which the attached model takes out again. In a loader with
    worker processes the workers never touch the store: batches are announced when they arrive in
    the process that trains.

    A batch counts as trained if the model is in training mode when it is made. A Trainer with
    `Memory.callback` knows it for certain.

    Args:
        memory: of the model.
        tokenizer_or_collator: what makes batches with `input_ids` [batch, time]. A tokenizer:
            `DataCollatorForLanguageModeling` without masking, which pads and makes labels.
        accumulate: batches of one step; a Trainer's own setting takes its place. A wrong number
            costs time only.
        check: compare the tokenizer, if there is one, with the one that the store was made for.

    Raises:
        FingerprintMismatchError: the tokenizer is not the store's.
        ConfigError: the tokenizer cannot pad; or it is neither a tokenizer nor a collator.
    """

    def __init__(
        self,
        memory: "Memory",
        tokenizer_or_collator: Any,
        *,
        accumulate: int = 1,
        check: bool = True,
    ) -> None:
        checked_accumulation(accumulate, 0)
        self._collate = _collator(tokenizer_or_collator)
        if check and self.tokenizer is not None:
            check_tokenizer(self.tokenizer, memory.session.recipe)
        self._marker = Marker(memory)
        arrivals_of(memory).accumulate = accumulate
        self._warned = False

    @property
    def tokenizer(self) -> Any:
        """Of the collator that makes the batches, if it has one: a Trainer saves it."""
        return getattr(self._collate, "tokenizer", None)

    def __call__(self, features: Any) -> Any:
        """Make one batch.

        Raises:
            InputError: it has no `input_ids`.
            TokenRangeError: an id is outside of the recipe's vocabulary; in a worker process the
                forward pass raises it.
        """
        batch = self._collate(features)
        if not isinstance(batch, MutableMapping) or "input_ids" not in batch:
            has = sorted(batch) if isinstance(batch, MutableMapping) else type(batch).__name__
            raise InputError(f"a batch needs input_ids to look up rows; it has {has}")
        if not self._warned and _restarts(batch.get("position_ids")):
            self._warned = True
            warnings.warn(
                "batches are packed (position_ids start again within a row): n-grams and the "
                "gates' convolution reach across the borders of the texts, but where the recipe "
                "has a separator. Pad instead of packing where that matters",
                RuntimeWarning,
                stacklevel=2,
            )
        self._marker.mark(batch, training=_TRAINING.get())
        return batch


class TrainingBatches:
    """Stands before the collator of a loader whose batches are trained, whatever that is.

    Args:
        memory: of the model.
        collate: the loader's.
    """

    def __init__(self, memory: "Memory", collate: Callable[[Any], Any]) -> None:
        self._collate, self._marker = collate, Marker(memory)

    def __call__(self, features: Any) -> Any:
        """Make one batch; it gets a ticket if it has `input_ids`."""
        before = _TRAINING.set(True)
        try:
            batch = self._collate(features)
        finally:
            _TRAINING.reset(before)
        if not isinstance(batch, MutableMapping) or "input_ids" not in batch:
            return batch
        if self._marker.key not in batch:
            self._marker.mark(batch, training=True)
        return batch


def _collator(given: Any) -> Callable[[Any], Any]:
    """A collator, or the usual one for a tokenizer."""
    if not hasattr(given, "convert_ids_to_tokens"):
        if not callable(given):
            raise ConfigError(
                f"a {type(given).__name__} makes no batches; pass a tokenizer of transformers, or "
                "a collator: a function from a list of features to a batch"
            )
        collate: Callable[[Any], Any] = given
        return collate
    from transformers import DataCollatorForLanguageModeling

    if given.pad_token is None:
        raise ConfigError(
            "the tokenizer has no pad_token, so texts of different lengths make no batch; set "
            "tokenizer.pad_token = tokenizer.eos_token, or pass a collator"
        )
    return DataCollatorForLanguageModeling(tokenizer=given, mlm=False)


def _restarts(positions: Any) -> bool:
    if not isinstance(positions, Tensor) or positions.ndim != 2:
        return False
    return bool((positions[:, 1:] < positions[:, :-1]).any())
