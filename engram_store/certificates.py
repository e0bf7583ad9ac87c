"""Certificates of a TLS connection: PEM files, checked before they are used.

gRPC takes whatever bytes it is given, and a bad file then looks like a network that fails. So
files are checked here, by the standard library, with messages that name the file. They are read
again when they change on disk, because certificates are renewed while processes run.
"""

import logging
import ssl
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from engram_store.errors import ConfigError

_logger = logging.getLogger(__name__)
_PRIVATE = 0o027
"""Permissions that a key must not have: others nothing, the group no writing."""
_TRUSTED = 0o002
"""Permissions that certificates must not have: who writes them decides who is believed."""
_MESSAGES = 10
"""More than a handshake has."""
Stamp = tuple[tuple[int, int, int] | None, ...]
"""Changes when one of the files does."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CertificatePaths:
    """Where one side of a connection keeps its PEM files."""

    authority: Path
    """Certificates of the CAs that sign for the other side."""
    certificate: Path | None = None
    """Our own, then those between it and its CA; None: the other side is shown none."""
    key: Path | None = None
    """The key of that certificate, without a pass phrase."""
    authority_name: str = "tls_ca"
    """How the setting of `authority` is called, for messages."""
    serves: bool = False
    """Whether our own certificate is a server's."""

    def named(self) -> Iterator[tuple[str, Path, int]]:
        """Setting, path, and permissions it must not have, of every file that is given."""
        yield self.authority_name, self.authority, _TRUSTED
        if self.certificate is not None:
            yield "tls_cert", self.certificate, _TRUSTED
        if self.key is not None:
            yield "tls_key", self.key, _PRIVATE


@dataclass(frozen=True, kw_only=True, slots=True)
class Certificates:
    """What the files hold: PEM, checked."""

    authority: bytes
    certificate: bytes | None = None
    key: bytes | None = field(default=None, repr=False)
    valid_until: str = ""
    """When our own certificate expires, for people; empty if there is none."""


class CertificateFiles:
    """Certificates on disk, as they are now. May be used by several threads.

    Args:
        paths: the files.

    Raises:
        ConfigError: see `read_certificates`.
    """

    def __init__(self, paths: CertificatePaths) -> None:
        self._paths = paths
        self._lock = threading.Lock()
        self._stamp = _stamp(paths)
        self._complaint: Stamp | None = None
        self._current = read_certificates(paths)

    @property
    def paths(self) -> CertificatePaths:
        """The files."""
        return self._paths

    def latest(self) -> Certificates:
        """What the files hold, read again if they changed; the same object if they did not.

        While they cannot be used, because a renewal is under way or has failed, what they held
        before; the log says so once.
        """
        with self._lock:
            stamp = _stamp(self._paths)
            if stamp == self._stamp:
                return self._current
            try:
                self._current = read_certificates(self._paths)
            except ConfigError as error:
                if stamp != self._complaint:
                    _logger.warning("changed certificates are not used: %s", error)
                self._complaint = stamp
            else:
                self._stamp = stamp
                until = self._current.valid_until
                _logger.info("certificates were read again%s", until and f"; valid until {until}")
            return self._current


def read_certificates(paths: CertificatePaths) -> Certificates:
    """Read the files and check that a connection can be made with them.

    Raises:
        ConfigError: a file cannot be read, is open to other users, or is no PEM; the key has a
            pass phrase or belongs to another certificate; the certificate is expired, not yet
            valid, or for another purpose.
    """
    before = _stamp(paths)
    content = {name: _read(name, path, denied) for name, path, denied in paths.named()}
    _check_certificates(paths.authority_name, paths.authority)
    until = ""
    if paths.certificate is not None and paths.key is not None:
        _check_certificates("tls_cert", paths.certificate)
        _check_key(paths.certificate, paths.key)
        until = _rehearse(paths.certificate, paths.key, serves=paths.serves)
    if _stamp(paths) != before:  # what was checked may not be what was read
        raise ConfigError(f"{', '.join(content)}: the files are being replaced; try again")
    return Certificates(
        authority=content[paths.authority_name],
        certificate=content.get("tls_cert"),
        key=content.get("tls_key"),
        valid_until=until,
    )


def _stamp(paths: CertificatePaths) -> Stamp:
    stamps: list[tuple[int, int, int] | None] = []
    for _, path, _ in paths.named():
        try:
            status = path.stat()
        except OSError:
            stamps.append(None)
        else:
            # The time of the change, not of the writing: it also tells a chmod and an old file
            # that was put in place.
            stamps.append((status.st_ino, status.st_ctime_ns, status.st_size))
    return tuple(stamps)


def _read(name: str, path: Path, denied: int) -> bytes:
    """Raises: ConfigError."""
    try:
        mode = path.stat().st_mode & 0o777
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"{name}: {path} cannot be read: {error.strerror}; give a PEM file that this user may "
            "read"
        ) from None
    if mode & denied:
        what, better = ("change it", "644") if denied == _TRUSTED else ("read or change it", "600")
        raise ConfigError(
            f"{name}: {path} has mode {mode:o}, so other users can {what}; chmod {better} it"
        )
    return content


def _check_certificates(name: str, path: Path) -> None:
    """Raises: ConfigError."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cafile=path)
    except (ssl.SSLError, OSError) as error:
        raise ConfigError(
            f"{name}: {path} holds no usable certificate ({_reason(error)}); give PEM, which "
            "begins with -----BEGIN CERTIFICATE-----"
        ) from None


def _check_key(certificate: Path, key: Path) -> None:
    """Raises: ConfigError."""
    asked: list[bool] = []

    def no_pass_phrase() -> bytes:
        asked.append(True)
        return b""

    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key, no_pass_phrase)
    except (ssl.SSLError, OSError) as error:
        if asked:
            problem = "has a pass phrase; store it without one, readable by this user alone"
        elif "mismatch" in _reason(error):
            problem = f"is not the key of the certificate {certificate}; give the two of one pair"
        else:
            problem = (
                f"is no usable key for {certificate} ({_reason(error)}); give PEM, which begins "
                "with -----BEGIN PRIVATE KEY-----"
            )
        raise ConfigError(f"tls_key: {key} {problem}") from None


def _rehearse(certificate: Path, key: Path, *, serves: bool) -> str:
    """Shake hands with ourselves, trusting this one certificate: what fails here fails everywhere.

    Returns:
        When the certificate expires.

    Raises:
        ConfigError: it is expired, not yet valid, or not for this side of a connection.
    """
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname, client.verify_mode = False, ssl.CERT_NONE
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    for context in (client, server):
        context.load_cert_chain(certificate, key)
    judge = client if serves else server
    judge.load_verify_locations(cafile=certificate)
    judge.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # its CA may be unknown here
    judge.verify_mode = ssl.CERT_REQUIRED
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    sides = (
        client.wrap_bio(to_client, to_server),
        server.wrap_bio(to_server, to_client, server_side=True),
    )
    try:
        for _ in range(_MESSAGES):
            if not [side for side in sides if not _finished(side)]:
                break
    except ssl.SSLError as error:
        raise ConfigError(
            f"tls_cert: {certificate} would be refused: {_reason(error)}; renew it, or check this "
            "machine's clock"
        ) from None
    shown = sides[0 if serves else 1].getpeercert() or {}
    return str(shown.get("notAfter", ""))


def _finished(side: ssl.SSLObject) -> bool:
    """Carry a handshake on as far as it goes. Raises: ssl.SSLError."""
    try:
        side.do_handshake()
    except ssl.SSLWantReadError:
        return False
    return True


def _reason(error: OSError) -> str:
    """What OpenSSL says, without its numbers."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_message
    if isinstance(error, ssl.SSLError) and error.reason:
        return error.reason.lower().replace("_", " ")
    return str(error.strerror or error)
