"""Others that read rows from a cold file, and fio, which says what the device can do.

Peers read a flat copy of the table that is out of memory. Most of them are so slow that they are
asked for few rows: what counts is the time of a row.
"""

import json
import mmap
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram_store.bench.machine import version_of
from engram_store.bench.peers.protocol import Traits, missing
from engram_store.engine.memory import forget_cached_pages
from engram_store.errors import EngramStoreError

FIO = "fio"
QUEUE_DEPTH = 128
_RAMP_MS = 500
"""How long fio reads before it counts."""
_FIO_MARGIN_SECONDS = 120.0
_ERROR_CHARACTERS = 500
_Rows = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceRate:
    """What fio reached."""

    reads_per_second: float
    cpu_us_per_read: float


def fio_missing() -> str | None:
    """What to do when there is no fio; None: there is one."""
    if shutil.which(FIO) is None:
        return (
            "fio is not installed, so nothing says what the device can do; install it with "
            "`apt install fio`, or the like"
        )
    return None


def run_fio(files: Sequence[Path], seconds: float) -> DeviceRate:
    """Random reads of 4 KiB past the page cache, as many at once as the device takes.

    Args:
        files: what is read; not changed.
        seconds: how long.

    Raises:
        EngramStoreError: fio failed, for example because io_uring is forbidden here.
    """
    command = [
        FIO, "--name=cold", f"--filename={':'.join(str(file) for file in files)}", "--readonly",
        "--rw=randread", "--bs=4k", "--direct=1", "--ioengine=io_uring",
        f"--iodepth={QUEUE_DEPTH}", "--norandommap", "--randrepeat=0", "--time_based",
        f"--runtime={round(1e3 * seconds)}ms", f"--ramp_time={_RAMP_MS}ms",
        "--file_service_type=random", "--output-format=json",
    ]  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="engram-store-bench-") as room:
        # It leaves files of its own where it runs.
        run = subprocess.run(  # noqa: S603 - arguments are our own
            command, capture_output=True, text=True, check=False, cwd=room,
            timeout=seconds + _FIO_MARGIN_SECONDS,
        )  # fmt: skip
    try:
        answer = json.loads(run.stdout[run.stdout.index("{") :])
        job = answer["jobs"][0]
        reads = job["read"]
        busy = (job["usr_cpu"] + job["sys_cpu"]) / 100 * reads["runtime"] * 1e3
        return DeviceRate(reads_per_second=reads["iops"], cpu_us_per_read=busy / reads["total_ios"])
    except (ValueError, LookupError, ZeroDivisionError):
        said = (run.stderr or run.stdout).strip()[-_ERROR_CHARACTERS:]
        raise EngramStoreError(
            f"fio ended with exit code {run.returncode} and no result: {said or 'it said nothing'}"
        ) from None


# ---------------------------------------------------------------------- peers


Read = Callable[[Path, int, _Rows], NDArray[Any]]
"""(flat file, values of a row, rows) to rows as uint16 bits; opens the file itself."""


@dataclass(frozen=True, slots=True)
class ColdPeer:
    """One way to read rows from a file that is not in memory."""

    traits: Traits
    most_rows: int
    """It is asked for so many rows at once."""
    read: Read

    @property
    def missing(self) -> str | None:
        """Why it cannot be used here, and what to do; None: it can."""
        return missing(self.traits)

    @property
    def version(self) -> str | None:
        """Of what it uses."""
        return version_of(self.traits.distribution)

    def measure(self, flat_file: Path, dim: int, rows: _Rows) -> tuple[float, float]:
        """(seconds, CPU seconds) for rows, opening the file included, none of it in memory."""
        forget_cached_pages(flat_file)
        cpu, wall = time.process_time(), time.perf_counter()
        self.read(flat_file, dim, rows)
        return time.perf_counter() - wall, time.process_time() - cpu


def _read_memmap(flat_file: Path, dim: int, rows: _Rows) -> NDArray[Any]:
    table = np.memmap(flat_file, np.uint16, "r").reshape(-1, dim)
    return np.array(table[rows])


def _read_random_memmap(flat_file: Path, dim: int, rows: _Rows) -> NDArray[Any]:
    with flat_file.open("rb") as file:
        memory = mmap.mmap(file.fileno(), 0, mmap.MAP_SHARED, mmap.PROT_READ)
    memory.madvise(mmap.MADV_RANDOM)
    table = np.frombuffer(memory, np.uint16).reshape(-1, dim)
    return table[rows]


def _read_by_pread(flat_file: Path, dim: int, rows: _Rows) -> NDArray[Any]:
    out = np.empty((rows.size, dim), np.uint16)
    row_bytes, raw = 2 * dim, out.reshape(-1).view(np.uint8).data
    fd = os.open(flat_file, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        for number, row in enumerate(rows.tolist()):
            part = raw[number * row_bytes : (number + 1) * row_bytes]
            os.preadv(fd, [part], row * row_bytes)
    finally:
        os.close(fd)
    return out


def _read_mapped_tensor(flat_file: Path, dim: int, rows: _Rows) -> NDArray[Any]:
    import torch

    values = flat_file.stat().st_size // 2
    flat: Any = torch.from_file(str(flat_file), shared=False, size=values, dtype=torch.bfloat16)
    answer = torch.nn.functional.embedding(torch.from_numpy(rows), flat.view(-1, dim))
    bits: NDArray[Any] = answer.view(torch.int16).numpy().view(np.uint16)
    return bits


PEERS = (
    ColdPeer(
        Traits(
            name="numpy memmap",
            what="table[rows] on one numpy.memmap: a page fault for each, with read-ahead",
            module="numpy",
            distribution="numpy",
        ),
        256,
        _read_memmap,
    ),
    ColdPeer(
        Traits(
            name="numpy memmap, MADV_RANDOM",
            what="the same without read-ahead, which numpy has no option for",
            module="numpy",
            distribution="numpy",
        ),
        8192,
        _read_random_memmap,
    ),
    ColdPeer(
        Traits(
            name="pread",
            what="one os.preadv for each row, POSIX_FADV_RANDOM, in the order of the request",
            module="numpy",
            distribution="numpy",
        ),
        8192,
        _read_by_pread,
    ),
    ColdPeer(
        Traits(
            name="mapped F.embedding",
            what="torch.nn.functional.embedding on a bfloat16 tensor of torch.from_file",
            module="torch",
            distribution="torch",
            extra="torch",
        ),
        256,
        _read_mapped_tensor,
    ),
)
"""In the order of the report."""
