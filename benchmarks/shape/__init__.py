"""Results in shape: small experiments whose direction, not size, is compared with published ones.

`python -m benchmarks.shape run --dir WORK` runs what is missing, `... report` writes the tables of
docs/results.md and the plots from benchmarks/results/shape.jsonl.
"""
