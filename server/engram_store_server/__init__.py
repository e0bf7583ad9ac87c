"""The store as a process of its own: the asynchronous shell around `engram_store`.

This version of engram-store runs embedded, in the trainer's process; nothing is served yet.
"""
