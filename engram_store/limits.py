"""Limits that trainers and store processes share; imports nothing, so that settings can use it."""

MAX_MESSAGE_BYTES = 256 << 20
"""Largest message between a trainer and a store process, unless the process is told otherwise."""
