"""What a conformance run found."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from engram_store.conformance.comparison import Comparison


@dataclass(frozen=True, slots=True)
class Tally:
    """Comparisons of one kind of vector file."""

    passed: int
    total: int


@dataclass(frozen=True, slots=True)
class Report:
    """All comparisons made with a directory of vector files."""

    comparisons: tuple[Comparison, ...]
    not_checked: Mapping[str, str] = field(default_factory=dict)
    """Kinds of files that were there but could not be checked here, and why."""

    @property
    def misses(self) -> tuple[Comparison, ...]:
        """The comparisons that failed."""
        return tuple(one for one in self.comparisons if not one.passed)

    @property
    def ok(self) -> bool:
        """Whether everything that was checked is as it should be."""
        return not self.misses

    @property
    def kinds(self) -> dict[str, Tally]:
        """Passed and total by kind, in the order of the files."""
        tallies: dict[str, Tally] = {}
        for one in self.comparisons:
            before = tallies.get(one.kind, Tally(0, 0))
            tallies[one.kind] = Tally(before.passed + one.passed, before.total + 1)
        return tallies

    def to_json(self) -> dict[str, Any]:
        """Tallies, misses and what was not checked, as JSON types."""
        return {
            "ok": self.ok,
            "kinds": {kind: asdict(tally) for kind, tally in self.kinds.items()},
            "misses": [asdict(miss) for miss in self.misses],
            "not_checked": dict(self.not_checked),
        }
