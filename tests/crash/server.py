"""A store process that is killed from within.

Run as `python server.py STORE PLAN`, where PLAN is JSON: {"socket", "overlay_bytes", "kill":
[failpoint, hit] or null}. Otherwise it is `engram-store serve`.
"""

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from engram_store import failpoints
from engram_store_server.app import run
from engram_store_server.config import ServerConfig


def main(path: str, plan: dict[str, Any]) -> None:
    if plan["kill"]:
        name, hit = plan["kill"]
        failpoints.arm(name, failpoints.kill, hit=hit)
    run(
        ServerConfig(
            data_dir=Path(path), socket=Path(plan["socket"]), overlay_bytes=plan["overlay_bytes"]
        )
    )


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
