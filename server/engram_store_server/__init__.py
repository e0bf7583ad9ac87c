"""The store as a process of its own: the asynchronous shell around `engram_store`."""
