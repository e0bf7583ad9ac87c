"""An export that is killed: run as `python killed_exporter.py STORE STEP TARGET COPY AT`.

Dies at the operation AT of those that change files; what it prints is how many there were.
"""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from engram_store import snapshots
from engram_store.layout.disk import Disk
from engram_store.testing.disk import CONTENT, NAMES

calls = 0


def dying(method: Callable[..., Any], at: int) -> Callable[..., Any]:
    """The same, unless it is the one to die at."""

    def call(*args: Any, **kwargs: Any) -> Any:
        global calls
        calls += 1
        if calls == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return method(*args, **kwargs)

    return call


def main(path: str, step: str, target: str, copy: str, at: str) -> None:
    for name in CONTENT | NAMES:
        setattr(Disk, name, dying(getattr(Disk, name), int(at)))
    snapshots.export(path, int(step), target, copy=copy == "True")
    os.write(1, b"%d\n" % calls)


if __name__ == "__main__":
    main(*sys.argv[1:])
