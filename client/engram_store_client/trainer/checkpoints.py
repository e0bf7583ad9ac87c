"""A memory's part of a Trainer's checkpoints: a directory in each, and going back to it."""

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engram_store.errors import ConfigError, StoreNotFoundError
from engram_store_client import checkpoint
from engram_store_client.ids import DEFAULT_NAME
from engram_store_client.trainer.pins import CheckpointPins, board_of

if TYPE_CHECKING:
    from transformers import TrainerState

    from engram_store_client.memory import Memory

_LOG = logging.getLogger(__name__)
_STATE_FILE = "trainer_state.json"
_TELLING = ("global_step", "epoch", "total_flos", "log_history", "best_metric")
"""What the states of two checkpoints of the same step differ in."""


class Checkpoints:
    """Saves a memory beside what a Trainer saves, and brings it back.

    Args:
        memory: of the model.
        run: the Trainer's output directory.
        given: the checkpoint that training resumes from, where the Trainer's own files do not
            tell; None: look for it.
    """

    def __init__(self, memory: "Memory", run: Path, given: Path | None) -> None:
        self._memory, self._run, self._given = memory, run, given
        self._pins = CheckpointPins(board_of(memory.session), run, memory.name)
        own = memory.name == DEFAULT_NAME
        self._folder = "engram" if own else f"engram-{memory.name}"

    def save(self, global_step: int) -> None:
        """Save gates and a snapshot into the Trainer's newest checkpoint.

        Raises: what `Memory.save_pretrained` raises; StoreNotFoundError: there is none.
        """
        directory = self._run / f"checkpoint-{global_step}"
        if not directory.is_dir():
            raise StoreNotFoundError(
                directory,
                "no checkpoint of the Trainer here, so there is nothing to save the tables with. "
                "The callback needs checkpoints in args.output_dir, one directory for each step",
            )
        self._memory.save_pretrained(directory / self._folder)
        self._pins.follow((global_step, checkpoint.read(directory / self._folder).snapshot))

    def resume(self, state: "TrainerState", asked: str | None) -> None:
        """Go back to the checkpoint that the Trainer has just loaded.

        Args:
            state: the Trainer's, from that checkpoint.
            asked: `args.resume_from_checkpoint`.

        Raises:
            StoreNotFoundError, SnapshotMismatchError, ConfigError: see `load`, or it is not clear
                which checkpoint that is. Neither tables nor gates were changed.
        """
        self.load(self._find(state, asked))

    def load(self, directory: Path) -> None:
        """Go back to the tables and gates of one of the Trainer's checkpoints.

        Raises:
            StoreNotFoundError: it has no memory of that name.
            SnapshotMismatchError: it belongs to another store, or its snapshot is gone.
            What `Memory.load` raises besides. Nothing was changed, here as above.
        """
        folder = directory / self._folder
        if not (folder / checkpoint.DENSE_FILE).is_file():
            raise StoreNotFoundError(
                folder,
                f"the checkpoint {directory.name} was saved without memory {self._memory.name!r}, "
                "or its saving was interrupted; tables and gates are as they were. Resume from an "
                "older checkpoint, train with memory.callback() from the beginning, or load "
                "another directory with memory.load()",
            )
        snapshot = checkpoint.read(folder).snapshot
        with self._pins.released_after(snapshot) as forgotten:
            self._memory.load(folder)
        self._pins.follow()
        if forgotten:
            _LOG.warning(
                "the tables are back at %s; later checkpoints (%s) have lost theirs and cannot be "
                "resumed",
                directory.name,
                ", ".join(map(str, forgotten)),
            )

    def _find(self, state: "TrainerState", asked: str | None) -> Path:
        """The directory that a Trainer's state was read from; Trainers do not tell it."""
        if self._given is not None:
            return self._given
        candidates = [self._run / f"checkpoint-{state.global_step}"]
        if asked is not None:
            candidates.insert(0, Path(asked))
        for directory in candidates:
            if _is_state_of(directory, state):
                return directory
        raise ConfigError(
            f"the Trainer resumes from global step {state.global_step}, but not from "
            f"{' or '.join(map(str, candidates))}, and does not tell from where; neither tables "
            "nor gates were changed. Say it to the callback too: memory.callback(resume_from=PATH)"
        )


def _is_state_of(directory: Path, state: "TrainerState") -> bool:
    """Whether a Trainer's state was read from that checkpoint."""
    try:
        saved = json.loads((directory / _STATE_FILE).read_text())
    except (OSError, ValueError):
        return False
    return isinstance(saved, dict) and all(
        _same(saved.get(field), getattr(state, field)) for field in _TELLING
    )


def _same(one: Any, other: Any) -> bool:
    """Compared as text: not a number is itself there."""
    return json.dumps(one, default=str) == json.dumps(other, default=str)
