"""Known bugs that the targets show. Replaying fails when one is fixed, until it is removed here."""

from tests.fuzz.target import Debt

DEBTS: tuple[Debt, ...] = ()
