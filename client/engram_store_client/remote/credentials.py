"""TLS of a session: the certificates it shows and trusts, and why a store does not take them."""

import socket
import ssl
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import grpc

from engram_store.certificates import CertificateFiles, CertificatePaths

_PROBE_SECONDS = 5.0


class ClientTls:
    """Certificates of a session. Read again for each of its connections, since files are renewed.

    Args:
        authority: PEM file of the CAs that sign stores' certificates.
        certificate: PEM file of the certificate to show; None: none, which stores refuse.
        key: PEM file of its key.
        server_name: the name in the store's certificate, where it is not the host of the address.

    Raises:
        ConfigError: a file cannot be used; see `certificates.read_certificates`.
    """

    def __init__(
        self,
        *,
        authority: Path,
        certificate: Path | None = None,
        key: Path | None = None,
        server_name: str | None = None,
    ) -> None:
        self._files = CertificateFiles(
            CertificatePaths(authority=authority, certificate=certificate, key=key)
        )
        self._server_name = server_name

    def open_channel(self, address: str, options: Sequence[tuple[str, Any]]) -> grpc.Channel:
        """A channel to `host:port` with these options of gRPC; nothing is sent yet."""
        now = self._files.latest()
        credentials = grpc.ssl_channel_credentials(now.authority, now.key, now.certificate)
        named = list(options)
        if self._server_name is not None:
            named.append(("grpc.ssl_target_name_override", self._server_name))
        return grpc.secure_channel(address, credentials, named)

    def explain(self, address: str) -> str | None:
        """Why the store at `host:port` and this session cannot agree on TLS; None: they can.

        Asks it once more, for at most some seconds: gRPC reports most of this as a socket that
        was closed.
        """
        host, _ = _split(address)
        name = self._server_name or host
        paths = self._files.paths
        try:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.load_verify_locations(cafile=paths.authority)
            if paths.certificate is not None:
                context.load_cert_chain(paths.certificate, paths.key)
            welcome = _shake_hands(address, context, name)
        except ssl.SSLCertVerificationError as error:
            return (
                f"its certificate does not hold for {name}: {error.verify_message}. Check tls_ca "
                f"({paths.authority}) and that its certificate names {name}; tls_server_name "
                "says which name to expect"
            )
        except ssl.SSLError as error:
            if not _speaks_plainly(error):
                return f"the TLS handshake failed: {error.reason or error}"
            return (
                "it does not speak TLS; start it with tls_cert, tls_key and tls_client_ca, or "
                "connect without tls settings if it was started with --insecure"
            )
        except OSError:
            return None
        if welcome:
            return None
        shown = "this session showed none: give tls_cert and tls_key"
        if paths.certificate is not None:
            shown = f"it refused {paths.certificate}; its log says why"
        return f"it takes only certificates that its tls_client_ca has signed, and {shown}"


def explain_plain_text(address: str) -> str | None:
    """Why the store at `host:port` hangs up on plain text; None: TLS is not the reason."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # nothing is entrusted
    try:
        _shake_hands(address, context, None)
    except OSError:
        return None
    return "it speaks TLS, and this session did not; give tls_ca, tls_cert and tls_key"


def _split(address: str) -> tuple[str, int]:
    url = urlsplit(f"//{address}")
    assert url.hostname
    assert url.port
    return url.hostname, url.port


def _shake_hands(address: str, context: ssl.SSLContext, name: str | None) -> bool:
    """Whether the other side still talks after a handshake; it judges certificates at its end.

    Raises:
        ssl.SSLError, OSError: there was no handshake.
    """
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection(_split(address), _PROBE_SECONDS) as raw,
        context.wrap_socket(raw, server_hostname=name) as stream,
    ):
        try:
            return bool(stream.recv(1))  # HTTP/2 servers speak first
        except TimeoutError:
            return True
        except OSError:
            return False


def _speaks_plainly(error: ssl.SSLError) -> bool:
    """Whether what came back was no TLS at all."""
    return (error.reason or "") in {"WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE"}
