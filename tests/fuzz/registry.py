"""Every target there is; the table in README.md says which parser each one covers."""

from dataclasses import replace

from tests.fuzz.debts import DEBTS
from tests.fuzz.target import Target
from tests.fuzz.targets import (
    answers,
    binaries,
    chunked,
    client,
    documents,
    exports,
    journals,
    messages,
    pins,
    records,
    sessions,
    settings,
)

_MODULES = (
    documents,
    binaries,
    journals,
    pins,
    exports,
    messages,
    chunked,
    sessions,
    answers,
    client,
    records,
    settings,
)
TARGETS: dict[str, Target] = {
    target.name: replace(target, debts=tuple(debt for debt in DEBTS if debt.target == target.name))
    for module in _MODULES
    for target in module.TARGETS
}
