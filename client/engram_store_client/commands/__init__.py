"""Commands of the tool; what they need (torch, kernels) is imported when they run.

Found through the entry-point group `engram_store.commands`.
"""
