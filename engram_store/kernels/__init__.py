"""Compiled loops of the hot paths, each beside its plain numpy reference.

Rules of this room: kernels release the interpreter lock (`nogil`), are compiled once (`cache`),
write into outputs that the caller allocated, never allocate and never start threads: one thread
per table stream is faster than a fork-join beside a busy trainer (docs/performance.md).
"""
