"""When a difference between two variants is called a finding. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from benchmarks.shape.plan import SEEDS
from benchmarks.shape.records import Records
from benchmarks.shape.variants import Variant

SMALLEST = 0.01
"""Differences below 1 % are never called a finding."""


@dataclass(frozen=True, slots=True)
class Difference:
    """How much higher a variant's perplexity is than its reference's.

    A seed stands for the same text in the same order on both sides, so differences are taken
    seed by seed: what an order of the text does to all variants alike is not in them.
    """

    by_seed: tuple[float, ...]
    """Relative: -0.1 is a tenth lower than the reference at the same seed."""
    spread: float
    """The larger of both variants' relative distances between their own seeds."""

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return fmean(self.by_seed)

    @property
    def finding(self) -> bool:
        """Whether the seeds agree: about the sign, and within the smaller of their differences."""
        same_sign = all(d > 0 for d in self.by_seed) or all(d < 0 for d in self.by_seed)
        apart = max(self.by_seed) - min(self.by_seed)
        return same_sign and self._smallest > max(apart, SMALLEST)

    @property
    def clear(self) -> bool:
        """A finding that is also larger than the distance between the seeds of either side."""
        return self.finding and self._smallest > self.spread

    @property
    def _smallest(self) -> float:
        return min(map(abs, self.by_seed))

    def __str__(self) -> str:
        """As the tables have it."""
        verdict = "no finding"
        if self.finding:
            verdict = "higher" if self.mean > 0 else "lower"
            verdict = verdict if self.clear else f"slightly {verdict}"
        return f"{verdict}: {' / '.join(f'{d * 100:+.1f}' for d in self.by_seed)} %"


def compare(ours: Sequence[float], theirs: Sequence[float]) -> Difference:
    """Perplexities of two variants, at the same seeds in the same order."""
    pairs = zip(ours, theirs, strict=True)
    return Difference(
        tuple(a / b - 1 for a, b in pairs),
        max(max(values) / min(values) - 1 for values in (ours, theirs)),
    )


def difference(
    records: Records, variant: Variant, reference: Variant, domain: str
) -> Difference | None:
    """Of two variants that were run at every seed; None: a run is missing."""
    ours = records.perplexities(variant, domain, SEEDS)
    theirs = records.perplexities(reference, domain, SEEDS)
    if len(ours) < len(SEEDS) or len(theirs) < len(SEEDS):
        return None
    return compare(ours, theirs)
