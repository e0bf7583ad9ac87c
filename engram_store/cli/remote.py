"""Commands on a store that a process serves: named by a URL instead of a directory.

Nothing of the client, and no gRPC, is imported unless a URL is given.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from engram_store_client.remote.administration import Administration

_PANEL = "A store process (URL)"
Target = Annotated[
    str,
    typer.Argument(
        metavar="DIR|URL",
        help="Directory of a store, or a store process: unix:///path/of/socket, tcp://host:port.",
        show_default=False,
    ),
]
Url = Annotated[
    str,
    typer.Argument(metavar="URL", help="unix:///path/of/socket or tcp://host:port."),
]
StoreName = Annotated[
    str,
    typer.Option(
        "--store",
        metavar="NAME",
        help="Which of its stores, if it serves several.",
        show_default=False,
        rich_help_panel=_PANEL,
    ),
]
TlsCa = Annotated[
    Path | None,
    typer.Option(
        help="PEM file of the CA that signed its certificate: use TLS.", rich_help_panel=_PANEL
    ),
]
TlsCert = Annotated[
    Path | None,
    typer.Option(help="PEM file of the certificate to show it.", rich_help_panel=_PANEL),
]
TlsKey = Annotated[
    Path | None, typer.Option(help="PEM file of that certificate's key.", rich_help_panel=_PANEL)
]


def connected(
    target: str,
    tls_ca: Path | None,
    tls_cert: Path | None,
    tls_key: Path | None,
    store: str = "",
) -> "Administration | None":
    """The process that an argument names; None: it names a directory.

    Args:
        target: a directory, or a URL.
        tls_ca, tls_cert, tls_key, store: options that go with URLs.

    Raises:
        ConfigError: such an option with a directory; see `engram_store_client.connect_admin`.
    """
    if target.startswith(("unix:", "tcp:")):
        from engram_store_client import connect_admin

        return connect_admin(target, tls_ca=tls_ca, tls_cert=tls_cert, tls_key=tls_key)
    given = {"--store": store, "--tls-ca": tls_ca, "--tls-cert": tls_cert, "--tls-key": tls_key}
    if wrong := [option for option, value in given.items() if value]:
        from engram_store.errors import ConfigError

        raise ConfigError(
            f"{wrong[0]} goes with the URL of a store process (unix:///path, tcp://host:port), "
            f"and {target} is a directory; leave it out"
        )
    return None
