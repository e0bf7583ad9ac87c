"""The demo's store process: `engram-store serve`, which ends when the demo does.

Run by its path, not as a module: that works in any virtual environment and imports nothing of
the client, so no torch.
"""

import os
import signal
import sys
import threading


def _end_with_the_demo() -> None:
    """Standard input is a pipe that the kernel closes when the demo is gone, even by kill -9."""
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def _serve() -> None:
    """As on the command line, but settings of the user's own stores do not count here."""
    for name in [name for name in os.environ if name.startswith("ENGRAM_STORE_")]:
        del os.environ[name]
    threading.Thread(target=_end_with_the_demo, daemon=True).start()
    from engram_store.cli import main

    main(["serve", *sys.argv[1:]])


if __name__ == "__main__":
    _serve()
