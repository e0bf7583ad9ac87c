"""Where one demo run keeps its files."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class DemoFiles:
    """Paths below the demo's directory."""

    root: Path

    @property
    def settings(self) -> Path:
        """The numbers of the run."""
        return self.root / "settings.json"

    @property
    def tokenizer(self) -> Path:
        """The tokenizer that was trained."""
        return self.root / "tokenizer.json"

    @property
    def prose(self) -> Path:
        """Training sequences of the second domain."""
        return self.root / "prose.npy"

    @property
    def base(self) -> Path:
        """Weights of the frozen model."""
        return self.root / "base.pt"

    @property
    def control_store(self) -> Path:
        """The store of the zero-table control."""
        return self.root / "control.engram"

    @property
    def store(self) -> Path:
        """The store that is trained undisturbed."""
        return self.root / "memory.engram"

    @property
    def second_store(self) -> Path:
        """The store that is trained again, with every interruption."""
        return self.root / "second.engram"

    @property
    def checkpoint(self) -> Path:
        """What the killed trainer left."""
        return self.root / "checkpoint"

    @property
    def resumed(self) -> Path:
        """Checkpoint of the interrupted run, at the step that is compared."""
        return self.root / "resumed"

    @property
    def reference(self) -> Path:
        """The same of the undisturbed run."""
        return self.root / "reference"

    @property
    def sockets(self) -> Path:
        """Directory of the store processes' sockets."""
        return self.root / "run"

    @property
    def log(self) -> Path:
        """Log lines of the store processes."""
        return self.root / "store.log"
