"""Sparse update rules: how a row and its state change under a gradient.

`kernels` holds the compiled rules that the engine runs, `reference` the same arithmetic in plain
numpy, equal bit for bit. Both compute post-images: old rows in, new rows out, nothing in place.
"""

from engram_store.optimizers.reference import apply_reference
from engram_store.optimizers.rules import Step, commit_seed, row_seeds, rule_step

__all__ = ["Step", "apply_reference", "commit_seed", "row_seeds", "rule_step"]
