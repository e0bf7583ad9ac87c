"""The command `engram-store`."""

from engram_store.cli.app import main

__all__ = ["main"]
