"""How people and programs reach a store process for administration."""

from pathlib import Path
from typing import TYPE_CHECKING

from engram_store.errors import ConfigError
from engram_store_client.transport import process_address

if TYPE_CHECKING:
    from engram_store_client.remote.administration import Administration


def connect_admin(
    url: str,
    *,
    tls_ca: str | Path | None = None,
    tls_cert: str | Path | None = None,
    tls_key: str | Path | None = None,
    tls_server_name: str | None = None,
    deadline_seconds: float = 60.0,
    work_seconds: float = 3600.0,
) -> "Administration":
    """Look after the stores of a process; nothing is sent before the first call.

    Args:
        url: `unix:///path/of/socket`, or `tcp://host:port`.
        tls_ca, tls_cert, tls_key, tls_server_name: as for `engram_store_client.connect`; the
            files are read once.
        deadline_seconds: for an answer that takes the store no work.
        work_seconds: for snapshots, restores, seals, folds, creations and verifications.

    Raises:
        ConfigError: an address of another kind, deadlines or TLS options that make no sense, or
            gRPC is not installed.
    """
    address = process_address(url)
    if address is None:
        raise ConfigError(
            f"{url!r} is no address of a store process: give unix:///path/of/socket or "
            "tcp://host:port; a directory is opened with engram_store.open"
        )
    try:
        import grpc  # noqa: F401 - asked for by name, for a message that helps
    except ImportError as error:
        raise ConfigError(
            f"a store process ({url}) is reached by gRPC: pip install 'engram-store[grpc]'"
        ) from error
    from engram_store_client.remote.administration import Administration
    from engram_store_client.remote.credentials import ClientTls

    tls = None
    if tls_ca is not None or tls_cert or tls_key or tls_server_name:
        if address.startswith("unix:"):
            raise ConfigError(f"TLS is for tcp:// addresses; {url} is reached without a network")
        if tls_ca is None or (tls_cert is None) != (tls_key is None):
            raise ConfigError(
                "TLS takes tls_ca, which signed the store's certificate, and tls_cert with "
                "tls_key, which the store takes; give all three"
            )
        tls = ClientTls(
            authority=Path(tls_ca),
            certificate=None if tls_cert is None else Path(tls_cert),
            key=None if tls_key is None else Path(tls_key),
            server_name=tls_server_name,
        )
    return Administration(
        address, tls=tls, deadline_seconds=deadline_seconds, work_seconds=work_seconds
    )
