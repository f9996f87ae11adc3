"""Makes a key and a certificate signing request for TLS.

``python -m fleetune.edge.agent.csr NAME`` prints both in PEM, the key first. It runs as a process of its own: the
library that it needs would take 9 MiB of a resident agent, for something that happens once in weeks.
"""

from __future__ import annotations

import sys

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


def make_csr(name: str) -> tuple[str, str]:
    """A new private key on P-256, and a request for a certificate with this common name; both in PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    csr = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return private.decode(), csr.public_bytes(pem).decode()


if __name__ == "__main__":
    sys.stdout.write("".join(make_csr(sys.argv[1])))
