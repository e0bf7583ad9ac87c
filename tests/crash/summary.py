"""Counts that the end of a test run prints: how much was tried, beside what passed."""

LINES: dict[str, str] = {}
"""By subject; filled by tests, printed by `conftest.pytest_terminal_summary`."""
