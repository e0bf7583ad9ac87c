"""A store process that stops at a named place, and is killed there when the test says so.

Run as `python held_server.py STORE SOCKET POINT HIT DIRECTORY`. At the HIT-th time that POINT is
reached it makes DIRECTORY/reached and waits for DIRECTORY/go. Commits wait until the windows of the
next step are staged, so that those get their rows early whatever else the machine does. Otherwise
it is `engram-store serve`.
"""

import sys
import time
from pathlib import Path
from typing import Any

from engram_store import failpoints
from engram_store.announced import AnnouncedWindows
from engram_store.window import Phase
from engram_store_server.app import run
from engram_store_server.config import ServerConfig


def stage_first() -> None:
    """Let no commit begin before the look-ahead threads are done with the next step."""
    claim = AnnouncedWindows.claim_early

    def claim_when_staged(self: AnnouncedWindows) -> Any:
        while any(
            lookup.phase in (Phase.ANNOUNCED, Phase.AHEAD)
            for window in self.of_step(self._begun + 1)
            for lookup in window.lookups.values()
        ):
            time.sleep(0.001)
        return claim(self)

    AnnouncedWindows.claim_early = claim_when_staged  # type: ignore[method-assign]


def main(path: str, socket: str, point: str, hit: str, directory: str) -> None:
    def stop() -> None:
        Path(directory, "reached").touch()
        while not Path(directory, "go").exists():
            time.sleep(0.005)
        failpoints.kill()

    stage_first()
    failpoints.arm(point, stop, hit=int(hit))
    run(ServerConfig(data_dir=Path(path), socket=Path(socket)))


if __name__ == "__main__":
    main(*sys.argv[1:])
