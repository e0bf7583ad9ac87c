"""`engram-store train`: a training run from a file."""

import os
from pathlib import Path
from typing import Annotated

import typer


def train(
    config: Annotated[
        Path | None,
        typer.Argument(metavar="CONFIG.yaml", help="What --template prints, filled in."),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="a.b=value", help="Set a key; may be repeated."),
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Print the memory plan and stop.")] = False,
    template: Annotated[
        bool, typer.Option("--template", help="Print a commented file to begin with.")
    ] = False,
) -> None:
    """Train a model with tables on disk, as a file says.

    The memory plan comes first. Exit code 2: the file makes no sense, or the run cannot fit; what
    would fit is printed.
    """
    from engram_store_client.runs import read_settings, template_text

    if template:
        typer.echo(template_text(), nl=False)
        return
    if config is None:
        raise typer.BadParameter(
            "name a file; --template prints one to begin with", param_hint="CONFIG.yaml"
        )
    settings = read_settings(config, overrides or ())
    # Idle threads of torch spin by default, on cores that the store's threads need.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from engram_store_client.runs.run import run

    run(settings, typer.echo, check_only=check)
