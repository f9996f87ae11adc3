"""Certificates for TLS: a root, one certificate for each member, and the list of those that were revoked."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fleetune.edge.protocol.errors import AuthorityError

_EARLIER = timedelta(minutes=10)
"""A certificate counts from a bit before it was made, for machines whose clocks are slow."""

_LIST_EARLIER = timedelta(days=1)
"""So does a list of revocations, and much earlier: a broker whose clock is slow would let nobody in."""

_ROOT_LIFE = timedelta(days=3650)
_PEM = serialization.Encoding.PEM

CertificateKey = ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey | rsa.RSAPublicKey


@dataclass(frozen=True)
class Certificate:
    """A certificate that was made.

    Attributes:
        pem: In PEM.
        serial: Its number, in hexadecimal.
    """

    pem: str
    serial: str


def make_key() -> ec.EllipticCurvePrivateKey:
    """A new key on P-256, which every broker and every Python understands."""
    return ec.generate_private_key(ec.SECP256R1())


def key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """A private key in PEM, not encrypted: for a file that only its owner can read."""
    return key.private_bytes(_PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


class CertificateAuthority:
    """A root and its key.

    Args:
        certificate: In PEM.
        key: In PEM.

    Raises:
        AuthorityError: One of them cannot be read, or they do not belong together.
    """

    def __init__(self, certificate: bytes, key: bytes) -> None:
        remedy = "restore the authority's folder from a backup"
        try:
            self._certificate = x509.load_pem_x509_certificate(certificate)
            private, public = serialization.load_pem_private_key(key, None), self._certificate.public_key()
        except (ValueError, TypeError, UnsupportedAlgorithm, x509.InvalidVersion) as error:
            raise AuthorityError(f"the authority's certificate or key cannot be read: {error}", remedy) from error
        if not isinstance(private, ec.EllipticCurvePrivateKey) or private.public_key() != public:
            raise AuthorityError("the authority's certificate is for another key", remedy)
        self._key = private

    @classmethod
    def make(cls, fleet: str, now: float) -> tuple[bytes, bytes]:
        """A new root: its certificate and its key, in PEM."""
        # No two roots share a name: where two count, whoever looks for a list of revocations finds the right one by it.
        key, name = make_key(), _name(fleet, f"authority since {_time(now):%Y-%m-%d %H:%M:%S.%f}")
        begins = _time(now) - _EARLIER
        builder = (
            _builder(name, name, key.public_key(), begins, _time(now) + _ROOT_LIFE)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(signs_certificates=True), critical=True)
        )
        return builder.sign(key, hashes.SHA256()).public_bytes(_PEM), key_pem(key)

    @property
    def begins(self) -> float:
        """Unix time at which it was made, in whole seconds."""
        return (self._certificate.not_valid_before_utc + _EARLIER).timestamp()

    @property
    def ends(self) -> float:
        """Unix time from which it counts no more."""
        return self._certificate.not_valid_after_utc.timestamp()

    def certify(self, fleet: str, name: str, public: CertificateKey, *, begins: float, expires: float) -> Certificate:
        """A certificate for a member: its common name is the member's name, and it may only connect."""
        builder = self._leaf(fleet, name, public, begins, expires).add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False
        )
        return self._sign(builder)

    def certify_broker(
        self, fleet: str, hosts: Iterable[str], public: CertificateKey, *, begins: float, expires: float
    ) -> Certificate:
        """A certificate for the broker: it may only be connected to, under these names."""
        names = [_host(host) for host in hosts]
        builder = (
            self._leaf(fleet, "broker", public, begins, expires)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
        )
        return self._sign(builder)

    def _leaf(
        self, fleet: str, name: str, public: CertificateKey, begins: float, expires: float
    ) -> x509.CertificateBuilder:
        subject = _name(fleet, name)
        return (
            _builder(subject, self._certificate.subject, public, _time(begins) - _EARLIER, _time(expires))
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs_certificates=False), critical=True)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
        )

    def _sign(self, builder: x509.CertificateBuilder) -> Certificate:
        certificate = builder.sign(self._key, hashes.SHA256())
        return Certificate(certificate.public_bytes(_PEM).decode(), f"{certificate.serial_number:x}")

    def revocations(self, serials: Iterable[tuple[str, float]], now: float) -> bytes:
        """The list of revoked certificates (CRL), in PEM.

        Args:
            serials: Number of each, and Unix time of its revocation.
            now: Unix time.
        """
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self._certificate.subject)
            .last_update(_time(now) - _LIST_EARLIER)
            .next_update(_time(now) + _ROOT_LIFE)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
            .add_extension(x509.CRLNumber(int(now * 1000)), critical=False)
        )
        for serial, when in serials:
            builder = builder.add_revoked_certificate(
                x509.RevokedCertificateBuilder().serial_number(int(serial, 16)).revocation_date(_time(when)).build()
            )
        return builder.sign(self._key, hashes.SHA256()).public_bytes(_PEM)


def read_csr(pem: str) -> CertificateKey:
    """The public key of a certificate signing request; its names do not count.

    Raises:
        ValueError: It is none, its signature is wrong, or the key is of another kind.
    """
    try:
        csr = x509.load_pem_x509_csr(pem.encode())
        public, valid = csr.public_key(), csr.is_signature_valid
    except (InvalidSignature, UnsupportedAlgorithm, x509.InvalidVersion) as error:
        raise ValueError(str(error)) from error
    if not valid:
        raise ValueError("the request is not signed with its own key")
    if isinstance(public, rsa.RSAPublicKey) and public.key_size < 2048:
        raise ValueError(f"an RSA key of {public.key_size} bits is too short")
    if isinstance(public, ec.EllipticCurvePublicKey) and not isinstance(public.curve, ec.SECP256R1):
        raise ValueError(f"the curve {public.curve.name} is not P-256")  # noqa: TRY004 - as below
    if not isinstance(public, ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey | rsa.RSAPublicKey):
        raise ValueError("the key is of another kind than P-256, Ed25519 and RSA")  # noqa: TRY004 - who asks may send any
    return public


def _name(fleet: str, name: str) -> x509.Name:
    return x509.Name(
        [x509.NameAttribute(NameOID.ORGANIZATION_NAME, fleet), x509.NameAttribute(NameOID.COMMON_NAME, name)]
    )


def _builder(
    subject: x509.Name, issuer: x509.Name, public: CertificateKey, begins: datetime, expires: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(begins)
        .not_valid_after(expires)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _time(when: float) -> datetime:
    return datetime.fromtimestamp(when, timezone.utc)
