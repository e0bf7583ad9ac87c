"""A process that serves a directory of stores."""

import re
import select
import subprocess
from pathlib import Path

from tests.integration.serving import ENGRAM_STORE, SECONDS, StoreProcess

_READY = re.compile(
    r"engram-store: serving (\S+) \((\d+) stores?\) on unix:(\S+)(?: and (tcp:\S+))?\n"
)


class HomeProcess(StoreProcess):
    """`engram-store serve` of a directory of stores, ready."""

    def __init__(self, directory: Path, *options: str) -> None:
        self._process = subprocess.Popen(
            [ENGRAM_STORE, "serve", directory, *options],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self._process.stdout is not None
        assert select.select([self._process.stdout], [], [], SECONDS)[0]
        self.line = self._process.stdout.readline()
        ready = _READY.fullmatch(self.line)
        assert ready is not None, (self.line, self._process.communicate())
        self.stores, self.socket, self.tcp = int(ready[2]), Path(ready[3]), ready[4]

    @property
    def url(self) -> str:
        return f"unix://{self.socket}"
