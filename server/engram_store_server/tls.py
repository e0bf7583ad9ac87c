"""Mutual TLS for TCP: which certificates a store process shows, and whose it takes."""

import logging

import grpc

from engram_store.certificates import CertificateFiles, CertificatePaths, Certificates
from engram_store_server.config import ServerConfig

_logger = logging.getLogger(__name__)


def server_credentials(config: ServerConfig) -> grpc.ServerCredentials | None:
    """What TCP is served with; None: without TLS.

    Every trainer must show a certificate of `tls_client_ca`. The files are read again for new
    connections when they have changed; connections that are there stay. Files that cannot be
    used then are logged, and those before them stay in use.

    Raises:
        ConfigError: a file cannot be used; see `certificates.read_certificates`.
    """
    if config.tls_cert is None or config.tls_key is None or config.tls_client_ca is None:
        return None
    files = CertificateFiles(
        CertificatePaths(
            authority=config.tls_client_ca,
            certificate=config.tls_cert,
            key=config.tls_key,
            authority_name="tls_client_ca",
            serves=True,
        )
    )
    used = files.latest()
    _logger.info("TLS on %s; certificate valid until %s", config.tcp, used.valid_until)

    def renewed() -> grpc.ServerCertificateConfiguration | None:
        """Called by gRPC before every handshake; None: nothing new."""
        nonlocal used
        latest = files.latest()
        if latest is used:
            return None
        used = latest
        return _configuration(used)

    return grpc.dynamic_ssl_server_credentials(
        _configuration(used),
        renewed,  # type: ignore[arg-type] # None is allowed; the types do not say so
        require_client_authentication=True,
    )


def _configuration(certificates: Certificates) -> grpc.ServerCertificateConfiguration:
    key, certificate = certificates.key, certificates.certificate
    assert key is not None
    assert certificate is not None
    return grpc.ssl_server_certificate_configuration(
        [(key, certificate)], root_certificates=certificates.authority
    )
