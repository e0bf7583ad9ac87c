"""What the tests of crashes and faults tried, in numbers, at the end of the run."""

import pytest

from tests.crash.summary import LINES


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line for each subject that ran."""
    for line in LINES.values():
        terminalreporter.write_line(line)
