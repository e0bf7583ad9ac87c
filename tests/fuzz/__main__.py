"""Runs targets outside pytest: `python -m tests.fuzz list|replay|fuzz|show`."""

import argparse
import base64
import contextlib
import importlib
import sys
from collections.abc import Sequence

from tests.fuzz import runner


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 1: a target failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument(
        "--registry", default="tests.fuzz.registry", help="module that holds the targets"
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="names of the targets")
    replay = commands.add_parser("replay", help="seeds, corpus and a few mutations; no atheris")
    replay.add_argument("--mutations", type=int, default=200)
    fuzz = commands.add_parser("fuzz", help="let atheris search")
    fuzz.add_argument("--seconds", type=int, default=60, help="of each target")
    fuzz.add_argument("--runs", type=int, default=-1, help="of each target; -1: no limit")
    fuzz.add_argument("--seed", type=int, default=1)
    for command in (replay, fuzz):
        command.add_argument("names", nargs="*", help="default: all")
    show = commands.add_parser("show", help="run one input here")
    show.add_argument("name")
    show.add_argument("data", help="base64")
    options = parser.parse_args(arguments)
    searching = options.command == "fuzz"
    with runner.instrumented() if searching else contextlib.nullcontext():
        targets = importlib.import_module(options.registry).TARGETS
    if options.command == "list":
        print("\n".join(targets))  # noqa: T201 - a command's output
        return 0
    if options.command == "show":
        target, data = targets[options.name], base64.b64decode(options.data)
        print("\n".join(runner.reproduce(target, data)))  # noqa: T201
        return 0
    failed = 0
    for name in options.names or targets:
        target = targets[name]
        if lacking := runner.missing(target):
            print(f"{name}: skipped, needs {', '.join(lacking)}", flush=True)  # noqa: T201
            continue
        if searching:
            outcome = runner.fuzz(
                target, runs=options.runs, seconds=options.seconds, seed=options.seed
            )
        else:
            outcome = runner.replay(target, options.mutations)
        failed += bool(outcome.problem)
        print(outcome.report(), flush=True)  # noqa: T201
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
