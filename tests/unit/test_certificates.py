"""Certificate files: what is refused before a connection is tried, and what renewal does."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from engram_store.certificates import CertificateFiles, CertificatePaths, read_certificates
from engram_store.errors import ConfigError
from tests.certificates import CLIENT, EXPIRED, FUTURE, SERVER, Authority, Issued, put_in_place


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


def paths(authority: Authority, issued: Issued, *, serves: bool = True) -> CertificatePaths:
    return CertificatePaths(
        authority=authority.cert, certificate=issued.cert, key=issued.key, serves=serves
    )


@pytest.mark.parametrize(("serves", "purpose"), [(True, SERVER), (False, CLIENT), (True, None)])
def test_good_files_are_read_as_they_are(
    authority: Authority, serves: bool, purpose: object
) -> None:
    """For either side, with or without a purpose in the certificate."""
    issued = authority.issue("localhost", purpose=purpose)  # type: ignore[arg-type]

    read = read_certificates(paths(authority, issued, serves=serves))

    assert read.authority == authority.cert.read_bytes()
    assert (read.certificate, read.key) == (issued.cert.read_bytes(), issued.key.read_bytes())
    assert read.valid_until.endswith("GMT")
    assert "PRIVATE" not in repr(read)


def test_a_side_may_have_no_certificate_of_its_own(authority: Authority) -> None:
    """It then only checks the other one."""
    read = read_certificates(CertificatePaths(authority=authority.cert))

    assert (read.certificate, read.key, read.valid_until) == (None, None, "")


def _missing(authority: Authority) -> Issued:
    return Issued(authority.issue().cert, Path("/nowhere/x.key"))


def _directory(authority: Authority) -> Issued:
    return Issued(authority.cert.parent, authority.issue().key)


def _readable(authority: Authority) -> Issued:
    issued = authority.issue()
    issued.key.chmod(0o644)
    return issued


def _writable(authority: Authority) -> Issued:
    issued = authority.issue()
    issued.cert.chmod(0o666)
    return issued


def _no_certificate(authority: Authority) -> Issued:
    issued = authority.issue()
    issued.cert.write_text("hello")
    return issued


def _cut_certificate(authority: Authority) -> Issued:
    issued = authority.issue()
    issued.cert.write_bytes(issued.cert.read_bytes()[:200])
    return issued


def _no_key(authority: Authority) -> Issued:
    issued = authority.issue()
    issued.key.write_bytes(issued.cert.read_bytes())
    return issued


@pytest.mark.parametrize(
    ("spoil", "parts"),
    [
        (_missing, ("tls_key: /nowhere/x.key cannot be read", "No such file", "give a PEM")),
        (_directory, ("tls_cert", "Is a directory")),
        (_readable, ("tls_key", "mode 644", "chmod 600")),
        (_writable, ("tls_cert", "mode 666", "chmod 644")),
        (_no_certificate, ("tls_cert", "no usable certificate", "BEGIN CERTIFICATE")),
        (_cut_certificate, ("tls_cert", "no usable certificate")),
        (_no_key, ("tls_key", "no usable key", "BEGIN PRIVATE KEY")),
        (lambda a: Issued(a.issue().cert, a.issue().key), ("tls_key", "is not the key of")),
        (lambda a: a.issue(pass_phrase=b"x"), ("tls_key", "pass phrase; store it without")),
        (lambda a: a.issue(days=EXPIRED), ("tls_cert", "certificate has expired; renew it")),
        (lambda a: a.issue(days=FUTURE), ("tls_cert", "not yet valid", "clock")),
        (lambda a: a.issue(purpose=CLIENT), ("tls_cert", "certificate purpose")),
    ],
)
def test_a_file_that_cannot_be_used_is_named(
    authority: Authority, spoil: Callable[[Authority], Issued], parts: tuple[str, ...]
) -> None:
    """With the setting, what is wrong, and what to do."""
    with pytest.raises(ConfigError) as caught:
        read_certificates(paths(authority, spoil(authority)))

    for part in parts:
        assert part in str(caught.value)


def test_a_bad_authority_is_called_as_its_setting_is(authority: Authority) -> None:
    """Servers and clients name it differently."""
    authority.cert.write_text("")
    where = CertificatePaths(authority=authority.cert, authority_name="tls_client_ca")
    with pytest.raises(ConfigError, match=r"tls_client_ca: .*ca\.pem holds no usable certificate"):
        read_certificates(where)


def test_a_group_may_read_a_key(authority: Authority) -> None:
    """As where a key is kept for several services, or mounted for a group."""
    issued = authority.issue()
    issued.key.chmod(0o440)
    assert read_certificates(paths(authority, issued)).key == issued.key.read_bytes()


def test_renewed_files_are_read_again_and_others_are_not(authority: Authority) -> None:
    """The same object tells that nothing has changed."""
    issued, renewed = authority.issue(), authority.issue()
    files = CertificateFiles(paths(authority, issued))
    first = files.latest()
    assert files.latest() is first

    issued.replace_with(renewed)

    assert files.latest().certificate == renewed.cert.read_bytes()
    assert files.latest() is files.latest()


def test_a_renewal_that_fails_leaves_the_certificates_in_use(
    authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    """One warning for each state of the files; the key that follows its certificate ends it."""
    issued, renewed = authority.issue(), authority.issue()
    files = CertificateFiles(paths(authority, issued))
    first = files.latest()

    put_in_place(issued.cert, renewed.cert.read_bytes())
    with caplog.at_level(logging.INFO):
        assert files.latest() is first
        assert files.latest() is first
        issued.key.unlink()
        assert files.latest() is first
        issued.key.write_bytes(renewed.key.read_bytes())
        issued.key.chmod(0o600)
        assert files.latest().key == renewed.key.read_bytes()

    levels = [record.levelname for record in caplog.records]
    assert levels == ["WARNING", "WARNING", "INFO"]
    assert "is not the key of" in caplog.text
    assert "No such file" in caplog.text
