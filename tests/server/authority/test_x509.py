"""Certificates, as OpenSSL sees them: what each may do, under which name, and who is revoked."""

from __future__ import annotations

import base64
import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed448, ed25519, rsa
from cryptography.x509.oid import NameOID

from fleetune.edge.protocol.errors import AuthorityError
from fleetune.server.authority.x509 import CertificateAuthority, key_pem, make_key, read_csr
from support.lacking import lacking

NOW = 1_800_000_000.0
DAY = 86400.0
PEM = serialization.Encoding.PEM
DER = serialization.Encoding.DER
_OPENSSL = shutil.which("openssl") or "openssl"


class Bench:
    """A root in files, and what it certifies."""

    def __init__(self, folder: Path, made: float = NOW, name: str = "lab") -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        certificate, key = CertificateAuthority.make(name, made)
        self.authority = CertificateAuthority(certificate, key)
        self.key = key
        self.root = self.write("root.pem", certificate)

    def write(self, name: str, content: str | bytes) -> Path:
        path = self.folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def device(self, name: str = "nano-1", days: float = 30.0) -> Path:
        made = self.authority.certify("lab", name, make_key().public_key(), begins=NOW, expires=NOW + days * DAY)
        return self.write(f"{name}.pem", made.pem)

    def broker(self, *hosts: str) -> Path:
        key = make_key().public_key()
        made = self.authority.certify_broker("lab", hosts, key, begins=NOW, expires=NOW + 365 * DAY)
        return self.write("broker.pem", made.pem)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    if not shutil.which(_OPENSSL):
        lacking("needs openssl: apt-get install openssl")
    return Bench(tmp_path_factory.mktemp("x509"))


def openssl(*arguments: str | Path) -> str:
    done = subprocess.run([_OPENSSL, *map(str, arguments)], capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def verify(roots: Path, certificate: Path, *arguments: str | Path, at: float = NOW + 60) -> str:
    """What is wrong with a certificate; empty if nothing is."""
    said = openssl("verify", "-x509_strict", "-attime", str(int(at)), "-CAfile", roots, *arguments, certificate)
    return "" if said.strip() == f"{certificate}: OK" else said


def serial(certificate: Path) -> str:
    return openssl("x509", "-noout", "-serial", "-in", certificate).strip().removeprefix("serial=")


# --- what a certificate is for ------------------------------------------------------------------------------------


def test_a_member_may_connect_and_nothing_else(bench: Bench) -> None:
    device = bench.device()
    assert verify(bench.root, device, "-purpose", "sslclient") == ""
    assert "unsuitable certificate purpose" in verify(bench.root, device, "-purpose", "sslserver")
    assert openssl("x509", "-noout", "-subject", "-in", device).strip() == "subject=O = lab, CN = nano-1"


def test_a_broker_may_be_connected_to_under_its_names_and_nothing_else(bench: Bench) -> None:
    broker = bench.broker("broker.local", "10.0.0.2", "fd00::2")
    assert verify(bench.root, broker, "-purpose", "sslserver", "-verify_hostname", "broker.local") == ""
    assert verify(bench.root, broker, "-purpose", "sslserver", "-verify_ip", "10.0.0.2") == ""
    assert verify(bench.root, broker, "-purpose", "sslserver", "-verify_ip", "fd00::2") == ""
    assert "hostname mismatch" in verify(bench.root, broker, "-verify_hostname", "broker")
    assert "IP address mismatch" in verify(bench.root, broker, "-verify_ip", "10.0.0.3")
    assert "unsuitable certificate purpose" in verify(bench.root, broker, "-purpose", "sslclient")


def test_a_name_that_is_no_host_is_no_brokers(bench: Bench) -> None:
    """The common name does not count where there are others."""
    assert "hostname mismatch" in verify(bench.root, bench.broker("broker.local"), "-verify_hostname", "nano-1")


def test_another_root_does_not_count(bench: Bench, tmp_path: Path) -> None:
    other = Bench(tmp_path)
    assert "unable to get local issuer" in verify(other.root, bench.device())
    assert "unable to get local issuer" in verify(bench.root, other.device())


def test_no_member_can_certify_anybody(bench: Bench) -> None:
    key = make_key()
    made = bench.authority.certify("lab", "evil", key.public_key(), begins=NOW, expires=NOW + DAY)
    evil = bench.write("evil.pem", made.pem)
    child = certify_with(x509.load_pem_x509_certificate(made.pem.encode()), key, ca=False)
    said = verify(bench.root, bench.write("child.pem", child), "-untrusted", evil)
    assert "invalid CA certificate" in said


def test_no_authority_stands_below_the_root(bench: Bench) -> None:
    """Its key may leak into one: the path is limited all the same."""
    root = x509.load_pem_x509_certificate(bench.root.read_bytes())
    root_key = serialization.load_pem_private_key(bench.key, None)
    assert isinstance(root_key, ec.EllipticCurvePrivateKey)
    between_key = make_key()
    between = certify_with(root, root_key, ca=True, public=between_key.public_key(), name="between")
    child = certify_with(x509.load_pem_x509_certificate(between), between_key, ca=False)
    untrusted = bench.write("between.pem", between)
    said = verify(bench.root, bench.write("grandchild.pem", child), "-untrusted", untrusted)
    assert "path length constraint exceeded" in said


def certify_with(
    issuer: x509.Certificate,
    key: ec.EllipticCurvePrivateKey,
    *,
    ca: bool,
    public: ec.EllipticCurvePublicKey | None = None,
    name: str = "child",
) -> bytes:
    public = public or make_key().public_key()
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(issuer.subject)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(issuer.not_valid_before_utc)
        .not_valid_after(issuer.not_valid_after_utc)
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        .add_extension(x509.KeyUsage(not ca, False, False, False, False, ca, ca, False, False), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
        .public_bytes(PEM)
    )


# --- time and numbers ---------------------------------------------------------------------------------------------


def test_a_certificate_counts_from_a_bit_before_it_was_made_until_it_expires(bench: Bench) -> None:
    device = bench.device(days=30)
    assert "not yet valid" in verify(bench.root, device, at=NOW - 700)
    assert verify(bench.root, device, at=NOW - 500) == ""
    assert verify(bench.root, device, at=NOW + 30 * DAY - 60) == ""
    assert "has expired" in verify(bench.root, device, at=NOW + 30 * DAY + 60)


def test_a_root_counts_for_ten_years(bench: Bench) -> None:
    device = bench.device(days=4000)
    assert verify(bench.root, device, at=NOW + 3649 * DAY) == ""
    assert "has expired" in verify(bench.root, device, at=NOW + 3651 * DAY)


def test_no_two_certificates_have_one_number(bench: Bench) -> None:
    serials = {serial(bench.device(f"nano-{i}")) for i in range(5)}
    assert len(serials) == 5
    assert min(len(number) for number in serials) > 30  # nobody guesses the next


@pytest.mark.parametrize("fleet", ["a", "f" * 64])
def test_every_fleets_name_has_a_certificate(tmp_path: Path, fleet: str) -> None:
    authority = CertificateAuthority(*CertificateAuthority.make(fleet, NOW))
    key = make_key().public_key()
    assert authority.certify(fleet, "d" * 64, key, begins=NOW, expires=NOW + DAY).pem
    assert authority.certify_broker(fleet, ["b" * 63], key, begins=NOW, expires=NOW + DAY).pem


def test_a_root_says_when_it_was_made(bench: Bench) -> None:
    assert bench.authority.begins == NOW


# --- revocation ---------------------------------------------------------------------------------------------------


def test_whoever_is_revoked_is_out_and_nobody_else(bench: Bench) -> None:
    out, in_ = bench.device("out"), bench.device("in")
    revoked = bench.write("crl.pem", bench.authority.revocations([(serial(out), NOW)], NOW))
    assert "certificate revoked" in verify(bench.root, out, "-crl_check", "-CRLfile", revoked)
    assert verify(bench.root, in_, "-crl_check", "-CRLfile", revoked) == ""
    assert "verify OK" in openssl("crl", "-in", revoked, "-noout", "-verify", "-CAfile", bench.root)


def test_a_list_on_which_nobody_stands_lets_all_in_for_years(bench: Bench) -> None:
    """A broker that has no list, or an old one, lets nobody in."""
    nobody = bench.write("crl.pem", bench.authority.revocations([], NOW))
    device = bench.device(days=3000)
    assert verify(bench.root, device, "-crl_check", "-CRLfile", nobody, at=NOW + 2900 * DAY) == ""


def test_a_broker_whose_clock_is_slow_takes_a_new_list(bench: Bench) -> None:
    """Or it lets nobody in until it is that late there, too."""
    key = make_key().public_key()
    made = bench.authority.certify("lab", "old", key, begins=NOW + 5 * DAY, expires=NOW + 9 * DAY)
    later = bench.write("crl.pem", bench.authority.revocations([], NOW + 6 * DAY))
    device = bench.write("old.pem", made.pem)
    assert verify(bench.root, device, "-crl_check", "-CRLfile", later, at=NOW + 6 * DAY - 20 * 3600) == ""


def test_a_list_of_somebody_else_does_not_count(bench: Bench, tmp_path: Path) -> None:
    theirs = bench.write("crl.pem", Bench(tmp_path).authority.revocations([], NOW))
    assert "unable to get certificate CRL" in verify(bench.root, bench.device(), "-crl_check", "-CRLfile", theirs)


def test_lists_are_numbered_as_they_follow(bench: Bench) -> None:
    numbers = []
    for now in (NOW, NOW + 1):
        crl = x509.load_pem_x509_crl(bench.authority.revocations([], now))
        numbers.append(crl.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number)
    assert numbers == sorted(set(numbers))


def test_during_a_rotation_both_roots_and_both_lists_are_told_apart(tmp_path: Path) -> None:
    """With one name for both, OpenSSL takes either list for either root, and lets nobody in."""
    old, new = Bench(tmp_path / "old"), Bench(tmp_path / "new", made=NOW + 10)
    roots = old.write("both.pem", new.root.read_bytes() + old.root.read_bytes())
    gone = [(serial(old.device("gone")), NOW)]
    lists = b"".join(bench.authority.revocations(gone, NOW + 20) for bench in (new, old))
    for order in (lists, b"".join(reversed(split(lists)))):
        crl = old.write("crl.pem", order)
        for bench in (old, new):
            assert verify(roots, bench.device(), "-crl_check", "-CRLfile", crl) == ""
        assert "certificate revoked" in verify(roots, old.folder / "gone.pem", "-crl_check", "-CRLfile", crl)


def split(lists: bytes) -> list[bytes]:
    end = b"-----END X509 CRL-----\n"
    return [part + end for part in lists.split(end) if part]


# --- a root's files -----------------------------------------------------------------------------------------------


def test_a_root_is_read_as_it_was_made(bench: Bench) -> None:
    assert CertificateAuthority(bench.root.read_bytes(), bench.key).begins == NOW


def test_a_key_of_another_root_is_refused(bench: Bench) -> None:
    for key in (key_pem(make_key()), ed25519_pem()):
        with pytest.raises(AuthorityError, match="is for another key") as caught:
            CertificateAuthority(bench.root.read_bytes(), key)
        assert "backup" in caught.value.remedy


def ed25519_pem() -> bytes:
    key = ed25519.Ed25519PrivateKey.generate()
    return key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


@pytest.mark.parametrize(
    "damage", [b"", b"nonsense", b"-----BEGIN PRIVATE KEY-----\nQUJD\n-----END PRIVATE KEY-----\n"]
)
def test_a_damaged_root_is_refused_without_its_key(bench: Bench, damage: bytes) -> None:
    with pytest.raises(AuthorityError, match="cannot be read"):
        CertificateAuthority(damage, bench.key)
    with pytest.raises(AuthorityError, match="cannot be read") as caught:
        CertificateAuthority(bench.root.read_bytes(), damage)
    assert "QUJD" not in str(caught.value)


# --- requests -----------------------------------------------------------------------------------------------------


def make_csr(key: object, name: str = "aggregator") -> x509.CertificateSigningRequest:
    builder = x509.CertificateSigningRequestBuilder().subject_name(
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    )
    alone = isinstance(key, ed25519.Ed25519PrivateKey | ed448.Ed448PrivateKey)
    return builder.sign(key, None if alone else hashes.SHA256())  # type: ignore[arg-type]


def pem(csr: x509.CertificateSigningRequest) -> str:
    return csr.public_bytes(PEM).decode()


@pytest.mark.parametrize("make", [
    make_key, ed25519.Ed25519PrivateKey.generate, lambda: rsa.generate_private_key(65537, 2048),
])  # fmt: skip
def test_of_a_request_only_the_key_counts(bench: Bench, make: Callable[[], ec.EllipticCurvePrivateKey]) -> None:
    """A device cannot ask to be the aggregator."""
    public = read_csr(pem(make_csr(make())))
    made = bench.authority.certify("lab", "nano-1", public, begins=NOW, expires=NOW + DAY)
    device = bench.write("asked.pem", made.pem)
    assert verify(bench.root, device, "-purpose", "sslclient") == ""
    assert "CN = nano-1" in openssl("x509", "-noout", "-subject", "-in", device)


@pytest.mark.parametrize(("make", "words"), [
    (lambda: ec.generate_private_key(ec.SECP192R1()), "is not P-256"),
    (lambda: ec.generate_private_key(ec.SECP256K1()), "is not P-256"),
    (lambda: rsa.generate_private_key(65537, 1024), "RSA key of 1024 bits is too short"),  # noqa: S505 - that is it
    (lambda: dsa.generate_private_key(1024), "of another kind"),  # noqa: S505
    (ed448.Ed448PrivateKey.generate, "of another kind"),
])  # fmt: skip
def test_a_weak_or_odd_key_is_refused(make: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read_csr(pem(make_csr(make())))


def test_a_request_for_somebody_elses_key_is_refused() -> None:
    own, other = make_csr(make_key()), make_csr(make_key())
    points = [
        csr.public_key().public_bytes(DER, serialization.PublicFormat.SubjectPublicKeyInfo) for csr in (own, other)
    ]
    theirs = other.public_bytes(DER)
    swapped = theirs.replace(points[1], points[0])
    assert swapped != theirs
    with pytest.raises(ValueError, match="not signed with its own key"):
        read_csr(as_pem(swapped))
    assert read_csr(as_pem(theirs))


def as_pem(der: bytes) -> str:
    return f"-----BEGIN CERTIFICATE REQUEST-----\n{base64.encodebytes(der).decode()}-----END CERTIFICATE REQUEST-----\n"


def test_whatever_a_device_sends_only_a_value_error_comes_out() -> None:
    """Anything else would end the authority's service: other curves, other versions, what no library knows."""
    der, chance = make_csr(make_key()).public_bytes(DER), random.Random(1)  # noqa: S311 - the same each time
    for _ in range(1500):
        changed = bytearray(der)
        for _ in range(chance.choice([1, 1, 2, 3])):
            changed[chance.randrange(len(changed))] = chance.randrange(256)
        try:
            read_csr(as_pem(bytes(changed)))
        except ValueError:
            continue
