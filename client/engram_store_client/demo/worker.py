"""The process that is killed, and the one that goes on: `python -m ...demo.worker DIRECTORY`.

Prints one JSON object per line: the step its store was at when it opened it, then every step's
number and loss.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engram_store_client.demo.base import make_base, prepare_torch
from engram_store_client.demo.files import DemoFiles
from engram_store_client.demo.memory import Arm, make_arm
from engram_store_client.demo.settings import Settings
from engram_store_client.transport import connect

RESUME = "--resume"


def main(directory: Path, *, resume: bool) -> None:
    """Train the second store from its start, or from the checkpoint."""
    files = DemoFiles(directory)
    settings, data = Settings.load(files.settings), np.load(files.prose)
    prepare_torch(settings)
    model = make_base(settings)
    model.load_state_dict(torch.load(files.base))
    with connect(files.killed_store) as session:
        _tell(found=session.step)
        arm = make_arm(model, session, settings)
        if resume:
            _resume(arm, data, files)
        else:
            _be_killed(arm, data, files)


def _be_killed(arm: Arm, data: Any, files: DemoFiles) -> None:
    """Train, with one checkpoint, until somebody ends this process."""
    arm.train(data, arm.settings.snapshot_at, _tell_step)
    arm.save(files.checkpoint)
    arm.train(data, arm.settings.steps, _tell_step)


def _resume(arm: Arm, data: Any, files: DemoFiles) -> None:
    """Go back to the checkpoint and train up to the step that is compared."""
    arm.load(files.checkpoint)
    arm.train(data, arm.settings.compare_at, _tell_step)
    arm.save(files.resumed)


def _tell_step(step: int, loss: float) -> None:
    _tell(step=step, loss=loss)


def _tell(**values: float) -> None:
    sys.stdout.write(f"{json.dumps(values)}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]), resume=RESUME in sys.argv[2:])
