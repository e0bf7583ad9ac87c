"""Trains a store, in this process or through another, and says what memory that took.

Run with an order, JSON: either `path` of a store or `address` of a store process; `steps`;
`group`, whose memory is looked at; `kill_after` so many steps; `starve`, to have it
believe that the page cache does.
"""

import hashlib
import json
import os
import signal
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

import engram_store
from engram_store.engine.cold import Paging
from engram_store.engine.memory import process_bytes
from engram_store.session import Session
from engram_store.store import Store
from tests.integration.cgroups import held_bytes

TOKENS, AHEAD, LAYER = (4, 128), 2, 1
VOCABULARY = 5000
DIFFERENT = 10
"""Batches, in turn: then rows come again that were trained before."""


def tokens_of(step: int) -> Any:
    """Random text: hardly an n-gram occurs twice in it, so every row is a page of its own."""
    return np.random.default_rng(step % DIFFERENT).integers(0, VOCABULARY, TOKENS)


def main() -> None:
    order = json.loads(sys.argv[1])
    group = Path(order["group"]) if order.get("group") else None
    if order.get("address"):
        import engram_store_client  # counted with the process, not with what it trains

        engram_store_client.connect  # noqa: B018
    if order.get("starve"):
        Paging.counted = _starved  # type: ignore[method-assign]
    before = process_bytes() + _shared_bytes()
    answer: dict[str, Any] = {"before_bytes": before}
    with ExitStack() as stack:
        session = stack.enter_context(_open(order))
        if isinstance(session, Store):
            engine: Any = session._engine
            answer["plan"] = {
                name: getattr(engine.memory_plan, name)
                for name in ("limit_bytes", "store_bytes", "overlay_bytes", "page_cache_bytes")
            }
        held = _train(session, order, group)
        answer |= {"held_bytes": held, "step": session.step, "digest": _digest(session)}
        answer["own_bytes"] = process_bytes() + _shared_bytes()
        answer["maps"] = Path("/proc/self/maps").read_text().count(".engram/")
        if isinstance(session, Store):
            table = session.stats().tables[LAYER]
            answer["pages_read"] = table.pages_read
    sys.stdout.write(json.dumps(answer) + "\n")


def _starved(self: Paging) -> tuple[int, int]:
    """Every row was waited for."""
    return 1000, 1000


def _open(order: dict[str, Any]) -> Any:
    if order.get("address"):
        from engram_store_client import connect

        return connect(order["address"])
    return engram_store.open(order["path"], "train", **order.get("options", {}))


def _digest(session: Session) -> str:
    """Of all rows that were trained."""
    digest = hashlib.sha256()
    for number in range(DIFFERENT):
        rows, _ = session.announce(tokens_of(number)).rows(LAYER)
        digest.update(rows.tobytes())
    return digest.hexdigest()


def _train(session: Session, order: dict[str, Any], group: Path | None) -> int:
    """The most memory that was held after a step."""
    held, end = 0, order["steps"]
    windows: dict[int, Any] = {}
    for step in range(session.step, end):
        for later in range(step, min(step + AHEAD + 1, end)):
            if later not in windows:
                windows[later] = session.announce(tokens_of(later), step=later)
        window = windows.pop(step)
        rows, _ = window.rows(LAYER)
        gradients = np.random.default_rng(step).standard_normal(rows.shape, np.float32)
        window.push(LAYER, gradients)
        session.commit(step, lr=0.05)
        if group is not None:
            held = max(held, held_bytes(group))
        if step + 1 == order.get("kill_after"):
            os.kill(os.getpid(), signal.SIGKILL)
    return held


def _shared_bytes() -> int:
    """Shared memory in this process's page tables."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssShmem:"))


if __name__ == "__main__":
    main()
