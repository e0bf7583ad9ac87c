"""The crash images find every planted bug, so they would have found it in the store."""

import re

import pytest

from tests.crash.exploring import Effort, Explorer, crash_directory
from tests.crash.mutants import MUTANTS, Mutant
from tests.crash.summary import LINES

_caught: set[str] = set()


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_planted_bug_is_found(mutant: Mutant) -> None:
    """Within the calls that it concerns; the first image that shows it is told in words."""
    effort = Effort(
        subsets=3, cuts=2, boots=3, chains=mutant.chains, stop_at=1, during=mutant.during
    )
    with mutant.patch(), crash_directory() as root:
        recording = mutant.workload.record(root, mutant.disk())
        report = Explorer(recording, root, effort, seed=0).run()

    assert report.violations, f"{mutant.name}: none of {report.images} images shows it"
    assert re.search(mutant.says, report.violations[0], re.DOTALL), report.violations[0]
    _caught.add(mutant.name)
    LINES["planted bugs"] = f"planted bugs caught by crash images: {len(_caught)}"
