"""Memory of a trainer: a fresh process that trains some steps through a store process.

`trainer_memory` starts it, `main` is what it runs.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from engram_store.bench.process import python_command
from engram_store.bench.workplace import LAYER
from engram_store.errors import EngramStoreError
from engram_store.types import TokenIds

STEPS = 20
_SECONDS = 600.0
_ERROR_CHARACTERS = 2000
_COUNTED = ("RssAnon", "RssShmem")
"""Mapped files are left out: a trainer maps none of the tables."""


def trainer_memory(address: str, tokens: TokenIds) -> int:
    """Bytes by which a trainer grows from before it connects to its largest after a step.

    Args:
        address: of the store process.
        tokens: int64 [different steps, batch, time], used in turn.

    Raises:
        EngramStoreError: the trainer failed.
    """
    with tempfile.TemporaryDirectory(prefix="engram-store-bench-") as room:
        file = Path(room) / "tokens.npy"
        np.save(file, tokens)
        command = python_command("engram_store.bench.footprint", address, str(file))
        result = subprocess.run(  # noqa: S603 - our own interpreter
            command, capture_output=True, text=True, timeout=_SECONDS, check=False
        )
    if result.returncode:
        raise EngramStoreError(
            f"the trainer whose memory is measured ended with exit code {result.returncode}: "
            f"{result.stderr[-_ERROR_CHARACTERS:].strip()}"
        )
    return int(result.stdout)


def main() -> None:
    """Train, and print the bytes. Arguments: address, file of tokens."""
    from engram_store_client import connect

    address, file = sys.argv[1:]
    tokens = np.load(file)
    before = _resident_bytes()
    most = before
    with connect(address) as session:
        for number in range(STEPS):
            window = session.announce(tokens[number % len(tokens)], step=session.step)
            window.rows(LAYER)
            gradients = window.gradient_buffer(LAYER)
            gradients.fill(1e-3)
            window.push(LAYER, gradients)
            session.commit(session.step, lr=0.01)
            most = max(most, _resident_bytes())
    sys.stdout.write(f"{most - before}\n")


def _resident_bytes() -> int:
    """Anonymous and shared memory of this process."""
    values = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return sum(int(values[name].split()[0]) * 1024 for name in _COUNTED)
