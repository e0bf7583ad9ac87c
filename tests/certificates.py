"""Certificates for tests: CAs that sign what a test needs, good or bad, as PEM files."""

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

VALID = (-1.0, 30.0)
"""Days from now."""
EXPIRED = (-3.0, -1.0)
FUTURE = (1.0, 3.0)
SERVER, CLIENT = ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH


@dataclass(frozen=True, slots=True)
class Issued:
    """A certificate and its key."""

    cert: Path
    key: Path

    def replace_with(self, other: "Issued") -> None:
        """Renew in place, as certificate managers do: never a file that is half written."""
        for mine, new in ((self.cert, other.cert), (self.key, other.key)):
            put_in_place(mine, new.read_bytes())


class Authority:
    """A CA. What it issues lies in a folder of its own."""

    def __init__(self, folder: Path, name: str = "ca") -> None:
        self._folder, self._count = folder / name, 0
        self._folder.mkdir()
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _name(name)
        unsigned = _unsigned(name, self._name, self._key, VALID).add_extension(
            x509.BasicConstraints(ca=True, path_length=None), critical=True
        )
        self.cert = self._folder / "ca.pem"
        self.cert.write_bytes(_signed(unsigned, self._key))

    def issue(
        self,
        *names: str,
        days: tuple[float, float] = VALID,
        purpose: x509.ObjectIdentifier | None = None,
        pass_phrase: bytes = b"",
    ) -> Issued:
        """A certificate for these host names or addresses."""
        self._count += 1
        key = ec.generate_private_key(ec.SECP256R1())
        unsigned = _unsigned(f"leaf {self._count}", self._name, key, days).add_extension(
            x509.SubjectAlternativeName(_alternatives(names or ("trainer",))), critical=False
        )
        if purpose is not None:
            unsigned = unsigned.add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        issued = Issued(self._folder / f"{self._count}.pem", self._folder / f"{self._count}.key")
        issued.cert.write_bytes(_signed(unsigned, self._key))
        hidden = BestAvailableEncryption(pass_phrase) if pass_phrase else NoEncryption()
        issued.key.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, hidden))
        issued.key.chmod(0o600)
        return issued


def put_in_place(path: Path, content: bytes) -> None:
    """Replace a file at once; its permissions stay."""
    new = path.with_suffix(".new")
    new.write_bytes(content)
    new.chmod(path.stat().st_mode & 0o777)
    new.rename(path)


def _name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _alternatives(names: Sequence[str]) -> list[x509.GeneralName]:
    found: list[x509.GeneralName] = []
    for name in names:
        try:
            found.append(x509.IPAddress(ipaddress.ip_address(name)))
        except ValueError:
            found.append(x509.DNSName(name))
    return found


def _unsigned(
    name: str, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, days: tuple[float, float]
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(_name(name))
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + timedelta(days=days[0]))
        .not_valid_after(now + timedelta(days=days[1]))
    )


def _signed(unsigned: x509.CertificateBuilder, key: ec.EllipticCurvePrivateKey) -> bytes:
    return unsigned.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM)
