"""Which commands there are, and what becomes of their errors.

A command's module is imported when the command is named or listed, so it imports at its top only
what its signature needs (typer), and everything else in the function. Other packages add commands
through the entry-point group `engram_store.commands`: a function for typer, or a `typer.Typer`.

Exit codes: 0 fine, 1 a check found a difference, 2 bad usage or input, 3 the store cannot be
opened or written.
"""

from collections.abc import Callable, Sequence
from importlib import import_module, metadata
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from engram_store.errors import (
    CapacityError,
    EngramStoreError,
    StoreExistsError,
    StoreFileError,
    StoreLockedError,
)

_COMMANDS = {
    "create": "engram_store.cli.create:create",
    "inspect": "engram_store.cli.inspect:inspect",
    "verify": "engram_store.cli.verify:verify",
    "snapshot": "engram_store.cli.snapshots:snapshot",
    "snapshots": "engram_store.cli.snapshots:snapshots",
    "restore": "engram_store.cli.snapshots:restore",
    "export": "engram_store.cli.export:export",
    "pin": "engram_store.cli.pins:pin",
    "unpin": "engram_store.cli.pins:unpin",
    "gc": "engram_store.cli.garbage:gc",
    "fold": "engram_store.cli.snapshots:fold",
    "stores": "engram_store.cli.stores:stores",
    "bench": "engram_store.cli.bench:bench",
    "conformance": "engram_store.cli.conformance:conformance",
}
_ENTRY_POINTS = "engram_store.commands"
_EXTRAS = {
    "torch": "engram-store[torch]",
    "transformers": "engram-store[hf]",
    **dict.fromkeys(("grpc", "grpc_health", "grpc_reflection"), "engram-store[server]"),
}


class LazyCommands(TyperGroup):
    """A group whose commands are loaded by name."""

    def list_commands(self, _ctx: Any) -> list[str]:
        """Our own in their order, then those of other packages."""
        others = {entry.name for entry in metadata.entry_points(group=_ENTRY_POINTS)}
        return [*_COMMANDS, *sorted(others - _COMMANDS.keys())]

    def get_command(self, _ctx: Any, cmd_name: str) -> Any:
        """The command with a name, or None."""
        if cmd_name in _COMMANDS:
            module, name = _COMMANDS[cmd_name].split(":")
            return _as_command(cmd_name, getattr(import_module(module), name))
        for entry in metadata.entry_points(group=_ENTRY_POINTS, name=cmd_name):
            try:
                return _as_command(cmd_name, entry.load())
            except ImportError as error:
                return _unavailable(cmd_name, error)
        return None


def _as_command(name: str, target: "typer.Typer | Callable[..., Any]", **settings: Any) -> Any:
    app = target
    if not isinstance(app, typer.Typer):
        app = typer.Typer(add_completion=False)
        app.command(name, **settings)(target)
    command = typer.main.get_command(app)
    command.name = name
    return command


def _unavailable(name: str, error: ImportError) -> Any:
    """Stands in for a command that cannot be imported, whatever its arguments are."""

    def explain() -> None:
        typer.echo(f"engram-store: {name} cannot run: {_what_is_missing(error)}", err=True)
        raise typer.Exit(2)

    settings = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
    return _as_command(
        name, explain, help=f"Not available: {_what_is_missing(error)}", context_settings=settings
    )


def _what_is_missing(error: ImportError) -> str:
    package = (error.name or "").partition(".")[0]
    if not isinstance(error, ModuleNotFoundError) or package not in _EXTRAS:
        return f"its package cannot be imported ({error})"
    return f"{package} is not installed; install it with `pip install '{_EXTRAS[package]}'`"


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"engram-store {metadata.version('engram-store')}")
        raise typer.Exit


_app = typer.Typer(cls=LazyCommands, no_args_is_help=True, add_completion=False)


@_app.callback()
def _root(
    _version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and stop."
        ),
    ] = False,
) -> None:
    """Disk-backed memory tables for Engram language models."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command line (`sys.argv` if none is given); always raises SystemExit."""
    command = typer.main.get_command(_app)
    try:
        command(args=arguments, prog_name="engram-store")
    except EngramStoreError as error:
        # An OSError with a number would show it before the sentence.
        message = error.strerror if isinstance(error, CapacityError) else str(error)
        _fail(message, _exit_code(error))
    except ModuleNotFoundError as error:
        if error.name not in _EXTRAS:
            raise
        _fail(_what_is_missing(error), 2)


def _fail(message: object, code: int) -> NoReturn:
    typer.echo(f"engram-store: {message}", err=True)
    raise SystemExit(code)


def _exit_code(error: EngramStoreError) -> int:
    if isinstance(error, StoreExistsError):
        return 2
    return 3 if isinstance(error, StoreFileError | StoreLockedError | CapacityError) else 2
