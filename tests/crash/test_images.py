"""Whatever a crash leaves behind, the store comes back as it was promised to.

Workloads are recorded operation by operation. At each moment every image that POSIX allows is
built, or a seeded choice of them, recovered by the store's own code, and compared with numpy.
"""

import pytest

from tests.crash.exploring import Effort, Explorer, Report, crash_directory
from tests.crash.recordings import WORKLOADS, Workload, returning
from tests.crash.summary import LINES

WANTED = 100_000
"""Images of all workloads together, in one run of all tests."""
_reports: dict[str, Report] = {}


def _explore(workload: Workload, effort: Effort, name: str) -> None:
    with crash_directory() as root:
        report = Explorer(workload.record(root), root, effort, seed=0).run()
    _reports[name] = report
    LINES["crash images"] = str(sum(_reports.values(), Report()))

    assert not report.violations, "\n".join([str(report), *report.violations[:10]])


@pytest.mark.slow
@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda workload: workload.name)
def test_every_crash_image_is_recovered(workload: Workload) -> None:
    _explore(workload, Effort(during=workload.during), workload.name)


@pytest.mark.slow
@pytest.mark.parametrize("durability", ["snapshot", "step"])
def test_a_second_crash_during_recovery_is_recovered(durability: str) -> None:
    """After a first one at each moment of going back to a snapshot."""
    effort = Effort(subsets=2, cuts=1, chains=1_000_000, during=frozenset({"restore"}))
    _explore(Workload(returning, durability), effort, f"second, {durability}")


def test_there_were_as_many_images_as_promised() -> None:
    """A change that makes workloads shorter must not weaken this suite unnoticed."""
    if len(_reports) < len(WORKLOADS) + 2:
        pytest.skip("not all workloads were selected")
    assert sum(report.images for report in _reports.values()) >= WANTED
