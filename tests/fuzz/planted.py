"""Targets with bugs on purpose: they show that the harness finds what it is for."""

import importlib
import importlib.util
import os
import time
from collections.abc import Callable

from engram_store.errors import ConfigError
from tests.fuzz.target import MEBIBYTE, Debt, Target

BUG = b"bug"
_BOUND_BYTES = 128 * MEBIBYTE
"""The counters of atheris need more than a quarter of it."""
Check = Callable[[bytes], None]


def _target(name: str, check: Check, *seeds: bytes, debts: tuple[Debt, ...] = ()) -> Target:
    return Target(
        name=name,
        check=check,
        seeds=lambda: iter((b"fine", *seeds)),
        allowed=(ConfigError,),
        memory_bytes=_BOUND_BYTES,
        seconds=1,
        debts=debts,
    )


def _on_bug(action: Callable[[], object]) -> Check:
    def check(data: bytes) -> None:
        if data == BUG:
            action()

    return check


def _raise(error: Exception) -> None:
    raise error


def _refuse(data: bytes) -> None:
    if data != b"fine":
        raise ConfigError("no")


def _refuse_everything(_data: bytes) -> None:
    raise ConfigError("even the first")


def _deep(data: bytes) -> None:
    # One branch each, so that each byte is progress.
    if data[:1] != b"a":
        return
    if data[1:2] != b"\xf7":
        return
    if data[2:3] != b"\x03":
        return
    raise KeyError("reached")


def _indebted(data: bytes) -> None:
    if data == b"debt":
        raise KeyError("known")
    if data == BUG:
        raise ZeroDivisionError


def _instrumented(check: Check) -> Check:
    """With atheris' counters, where it is installed."""
    if importlib.util.find_spec("atheris") is None:
        return check
    instrumented: Check = importlib.import_module("atheris").instrument_func(check)
    return instrumented


_DEBT = Debt(
    target="debt", error=KeyError, where="planted.py", reason="on purpose", example=b"debt"
)
TARGETS = {
    target.name: target
    for target in (
        _target("error", _on_bug(lambda: _raise(KeyError("planted"))), BUG),
        _target("refusal", _refuse, b"bad"),
        _target("deep", _instrumented(_deep)),
        _target("crash", _on_bug(os.abort), BUG),
        _target("hang", _on_bug(lambda: time.sleep(60)), BUG),
        _target("memory", _on_bug(lambda: bytearray(2 * _BOUND_BYTES)), BUG),
        _target("exit", _on_bug(lambda: os._exit(0)), BUG),
        _target("refused-seed", _refuse_everything),
        _target("paid-debt", lambda _data: None, debts=(_DEBT,)),
        _target("debt", _indebted, b"debt", debts=(_DEBT,)),
        _target("debt-and-bug", _indebted, BUG, debts=(_DEBT,)),
    )
}
