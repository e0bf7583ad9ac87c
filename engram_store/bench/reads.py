"""How many bytes of rows a second a reader gets, and how many a plain socket moves."""

import itertools
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import numpy as np

from engram_store.bench.workplace import LAYER, Batch, touched
from engram_store.engine.lookup import LookupScratch
from engram_store.recipes import Recipe
from engram_store.session import Session
from engram_store.types import TokenIds

IN_FLIGHT = 4
"""Windows announced at once, each by a thread of its own."""
WINDOWS = 8
"""Different windows that are read in turn: together more than a processor's cache holds."""
_GIGABYTE = 1e9


def windows_of(
    recipe: Recipe, batches: list[Batch], row_bytes: int, wanted_bytes: int
) -> list[TokenIds]:
    """Windows whose unique rows are about `wanted_bytes`, or whole batches where those are less.

    Returns:
        int64 [1, tokens] each, all of the same length, found with the first batch.
    """
    scratch, tokens = LookupScratch(), batches[0].tokens.reshape(1, -1)

    def bytes_of(count: int) -> int:
        rows, _ = scratch.look_up(recipe, LAYER, tokens[:, :count], None, None)
        return rows.size * row_bytes

    low, high = 1, tokens.size
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if bytes_of(middle) < wanted_bytes else (low, middle)
    return [batch.tokens.reshape(1, -1)[:, :low].copy() for batch in batches[:WINDOWS]]


def read_rate(session: Session, windows: list[TokenIds], seconds: float) -> float:
    """Gigabytes of row bytes a second, with `IN_FLIGHT` read-only windows announced at once."""
    end = time.perf_counter() + seconds

    def reader(first: int) -> int:
        received = 0
        for number in itertools.count(first, IN_FLIGHT):
            with session.announce(windows[number % len(windows)]) as window:
                received += window.rows(LAYER)[0].nbytes
            if time.perf_counter() >= end:
                return received
        raise AssertionError

    with ThreadPoolExecutor(IN_FLIGHT) as pool:
        started = time.perf_counter()
        received = sum(pool.map(reader, range(IN_FLIGHT)))
        return received / (time.perf_counter() - started) / _GIGABYTE


def loopback_rate(message_bytes: int, seconds: float) -> float:
    """Gigabytes a second that one plain TCP socket of this host moves, from thread to thread."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        sender = socket.create_connection(listener.getsockname())
        receiver, _ = listener.accept()
    source, target = (touched(message_bytes, np.uint8).data for _ in range(2))
    end = time.perf_counter() + seconds

    def send() -> None:
        with closing(sender):
            sender.sendall(source)
            while time.perf_counter() < end:
                sender.sendall(source)

    thread = threading.Thread(target=send, name="engram-bench-sender", daemon=True)
    received, started = 0, time.perf_counter()
    thread.start()
    with closing(receiver):
        while count := receiver.recv_into(target):
            received += count
        elapsed = time.perf_counter() - started
    thread.join()
    return received / elapsed / _GIGABYTE
