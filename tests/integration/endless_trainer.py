"""A trainer that trains, seals, folds and removes snapshots until its standard input ends.

Run as `python endless_trainer.py STORE OVERLAY_BYTES`. Every step is `tests.crash.actions`' step of
that number, so that an oracle can repeat it.
"""

import os
import select
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import engram_store
from engram_store.store import Store
from tests.crash.actions import Action, do


def look_after(store: Store) -> None:
    """What a store at work does besides, a little of everything."""
    step = store.step
    store.snapshot()
    if step % 3 == 0:
        store.seal()
    if step % 2 == 0:
        store.fold()
    store.collect_garbage(keep=1)


def main(path: str, overlay_bytes: str) -> None:
    with engram_store.open(
        path, "train", overlay_bytes=int(overlay_bytes), keep_snapshots=1
    ) as store:
        os.write(1, b"open\n")
        while not select.select([sys.stdin], [], [], 0)[0]:
            do(store, Action("step", store.step))
            look_after(store)
    os.write(1, b"%d\n" % store.step)


if __name__ == "__main__":
    main(*sys.argv[1:])
