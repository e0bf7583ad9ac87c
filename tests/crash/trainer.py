"""A trainer that is killed: does what the test planned and says so after every action.

Run as `python trainer.py STORE PLAN`, where PLAN is JSON: {"overlay_bytes", "durability",
"memtable_dir" or null, "actions" (see `actions.py`'s `Action`), "kill": [failpoint, hit] or null,
"kill_after": a method of the catalog or null, "syncs": false for a trainer that does without}. Each
action that came back is one line on stdout, written without a buffer: the step, the durable step.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import engram_store
from engram_store import failpoints
from engram_store.engine.catalog import Catalog
from tests.crash.actions import Action, do


def kill_after(method: str) -> None:
    """Die when a method of the catalog returns."""
    original = getattr(Catalog, method)

    def call(*args: Any, **kwargs: Any) -> Any:
        original(*args, **kwargs)
        failpoints.kill()

    setattr(Catalog, method, call)


def main(path: str, plan: dict[str, Any]) -> None:
    if plan["kill"]:
        name, hit = plan["kill"]
        failpoints.arm(name, failpoints.kill, hit=hit)
    if not plan["syncs"]:
        os.fdatasync = os.fsync = lambda fd: None
    if plan["kill_after"]:
        kill_after(plan["kill_after"])
    store = engram_store.open(
        path,
        "train",
        overlay_bytes=plan["overlay_bytes"],
        memtable_dir=plan["memtable_dir"],
        durability=plan["durability"],
        fold_ratio=100,
    )
    os.write(1, b"open\n")
    for kind, number, seed in plan["actions"]:
        do(store, Action(kind, number, seed))
        os.write(1, b"%d %d\n" % (store.step, store.durable_step))
    os.write(1, b"end\n")
    store.close()


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
