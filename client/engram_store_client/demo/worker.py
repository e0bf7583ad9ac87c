"""The trainer that is killed: `python -m engram_store_client.demo.worker DIRECTORY`.

Reads one line: the store, as `connect` takes it. Prints one JSON object per line: every step's
number and loss.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch

from engram_store_client.demo.base import make_base, prepare_torch
from engram_store_client.demo.files import DemoFiles
from engram_store_client.demo.memory import make_arm
from engram_store_client.demo.settings import Settings
from engram_store_client.transport import connect


def main(directory: Path) -> None:
    """Train in the demo's directory, with one checkpoint, until somebody ends this process."""
    files = DemoFiles(directory)
    settings, data = Settings.load(files.settings), np.load(files.prose)
    prepare_torch(settings)
    model = make_base(settings)
    model.load_state_dict(torch.load(files.base))
    store = sys.stdin.readline().rstrip("\n")
    if not store:  # the demo is gone
        return
    with connect(store) as session:
        arm = make_arm(model, session, settings)
        arm.train(data, settings.snapshot_at, _tell)
        arm.save(files.checkpoint)
        arm.train(data, settings.steps, _tell)


def _tell(step: int, loss: float) -> None:
    sys.stdout.write(f"{json.dumps({'step': step, 'loss': loss})}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
