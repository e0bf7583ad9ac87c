"""What a setting may be: one rule turns the text or TOML value of a setting into its value."""

import ipaddress
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engram_store.types import Durability

_WORDS = {"1": True, "true": True, "yes": True, "on": True}
_WORDS |= {"0": False, "false": False, "no": False, "off": False}
MAX_SOCKET_PATH_BYTES = 107
"""Linux's limit on the path of a Unix socket."""
SOCKET_PATH_STOPS = "%?#"
"""gRPC reads a socket's path as part of a URL, where these mean something else."""
MAX_INT32 = (1 << 31) - 1
"""gRPC's own settings are no larger."""


@dataclass(frozen=True, slots=True)
class Rule:
    """How a setting is read."""

    allowed: str
    """Completes the sentence 'allowed is ...'."""
    parse: Callable[[Any], Any]
    """Raises ValueError or TypeError for everything else."""


def path_rule() -> Rule:
    """A path."""

    def parse(value: Any) -> Path:
        if not isinstance(value, str | Path) or not str(value):
            raise TypeError
        return Path(value)

    return Rule("a path", parse)


def socket_rule() -> Rule:
    """A path that gRPC can listen on, short enough for a socket."""

    def parse(value: Any) -> Path:
        path: Path = path_rule().parse(value)
        if len(os.fsencode(path)) > MAX_SOCKET_PATH_BYTES or set(str(path)) & set(
            SOCKET_PATH_STOPS
        ):
            raise ValueError
        return path

    return Rule(
        f"a path of at most {MAX_SOCKET_PATH_BYTES} bytes without %, ? and #, which gRPC reads as "
        "parts of a URL",
        parse,
    )


def switch_rule() -> Rule:
    """Yes or no."""

    def parse(value: Any) -> bool:
        return value if isinstance(value, bool) else _WORDS[value.lower()]

    return Rule("true or false", parse)


def whole_rule(at_least: int, at_most: int | None = None, unit: str = "") -> Rule:
    """A whole number; a fraction is refused, never rounded."""

    def parse(value: Any) -> int:
        if isinstance(value, bool | float):
            raise TypeError
        number = int(value)
        if number < at_least or (at_most is not None and number > at_most):
            raise ValueError
        return number

    limit = f"at least {at_least:,}" if at_most is None else f"{at_least:,} to {at_most:,}"
    return Rule(f"a whole number{unit and ' of '}{unit}, {limit}", parse)


def number_rule(at_least: float, at_most: float, unit: str = "") -> Rule:
    """A number, fractions too."""

    def parse(value: Any) -> float:
        if isinstance(value, bool):
            raise TypeError
        try:
            number = float(value)
        except OverflowError:  # a whole number that no float can hold
            raise ValueError from None
        if not at_least <= number <= at_most:  # nor is NaN
            raise ValueError
        return number

    return Rule(f"a number{unit and ' of '}{unit}, {at_least:,} to {at_most:,}", parse)


def choice_rule(*choices: str) -> Rule:
    """One of a few words."""

    def parse(value: Any) -> str:
        return choices[choices.index(value)]

    return Rule(" or ".join(repr(choice) for choice in choices), parse)


def durability_rule() -> Rule:
    """When applied steps outlive the host."""

    def parse(value: Any) -> str:
        Durability.parse(value)
        return str(value)

    return Rule("'snapshot', 'step', or 'group(MS)' with 1 to 60000 milliseconds", parse)


def address_rule() -> Rule:
    """A host and a port."""

    def parse(value: Any) -> str:
        split_address(value)
        return str(value)

    return Rule("HOST:PORT, an IPv6 host in brackets", parse)


def split_address(address: str) -> tuple[str, int]:
    """Host and port of 'host:port' or '[::1]:port'.

    Raises:
        ValueError, AttributeError: it is not one.
    """
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdecimal() or int(port) > 65_535:
        raise ValueError(address)
    if host.startswith("[") and host.endswith("]"):
        return host[1:-1], int(port)
    if ":" in host:
        raise ValueError(address)
    return host, int(port)


def is_loopback(address: str) -> bool:
    """Whether only this machine can reach it. Names other than localhost are not looked up."""
    host, _ = split_address(address)
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
