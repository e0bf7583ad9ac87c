"""The paper's learning rate of tables: in one place, without torch."""

TABLE_LR_FACTOR = 5.0
"""Learning rate of tables, as a multiple of the dense parameters'. Their weight decay is 0.

Source: Engram paper (arXiv:2601.07372), section 4."""
