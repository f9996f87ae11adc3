"""One real computation for each package of the plain install: ``python -m fleetune.tools.doctor.kernels PACKAGE``.

A wheel that uses instructions which this processor lacks ends its process with SIGILL, and often only in the function
that uses them: importing a package proves nothing. Each function here compares with numbers that it knows otherwise.
"""

from __future__ import annotations

import base64
import math
import sys
from collections.abc import Callable

_SIZE = 48
"""Rows and columns of a product: large enough for the kernels that a training step uses, and for their rests."""

# y = Softmax(Erf(MatMul(a, b))), with the operator set and the IR version of a pack's graphs. It was made on a
# workstation: onnx.helper.make_graph([make_node("MatMul", ["a", "b"], ["p"]), make_node("Erf", ["p"], ["e"]),
# make_node("Softmax", ["e"], ["y"])], "k", [a, b], [y]), where a is float [m, k], b is [k, n], and y is [m, n].
_GRAPH = base64.b64decode(
    "CAk6eQoRCgFhCgFiEgFwIgZNYXRNdWwKCwoBcBIBZSIDRXJmCg8KAWUSAXkiB1NvZnRtYXgSAWtaFQoBYRIQCg4IARIKCgMS"
    "AW0KAxIBa1oVCgFiEhAKDggBEgoKAxIBawoDEgFuYhUKAXkSEAoOCAESCgoDEgFtCgMSAW5CBAoAEBQ="
)

Rows = list[list[float]]


def _expect(same: bool, what: str) -> None:
    if not same:
        raise ArithmeticError(f"{what} is wrong")


def _matrices() -> tuple[Rows, Rows, Rows]:
    """Two matrices of small integers, and their product, which is exact in float32."""
    span = range(_SIZE)
    a = [[float((7 * i + 3 * j) % 5 - 2) for j in span] for i in span]
    b = [[float((2 * i + 5 * j) % 7 - 3) for j in span] for i in span]
    return a, b, [[sum(a[i][k] * b[k][j] for k in span) for j in span] for i in span]


def _numpy() -> None:
    import numpy as np

    a, b, product = _matrices()
    for kind in (np.float32, np.float64):
        _expect((np.array(a, kind) @ np.array(b, kind)).tolist() == product, f"a product in {kind.__name__}")
    powers = np.exp(np.linspace(-4, 4, 99, dtype=np.float32))
    known = [math.exp(-4 + 8 * step / 98) for step in range(99)]
    _expect(np.allclose(powers, known, rtol=1e-5), "exp")
    square = np.array(a) + 99 * np.eye(_SIZE)
    _expect(np.allclose(np.linalg.solve(square, square @ np.ones(_SIZE)), 1.0), "linalg.solve")
    _expect(np.sort(np.array(a, np.float16), axis=None).tolist() == sorted(value for row in a for value in row), "sort")


def _onnxruntime() -> None:
    import numpy as np
    import onnxruntime

    import fleetune.edge  # noqa: F401 - the runtime reports to nobody

    a, b, product = _matrices()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(_GRAPH, options, providers=["CPUExecutionProvider"])
    scaled = np.array(b, np.float32) / 64
    (found,) = session.run(None, {"a": np.array(a, np.float32), "b": scaled})
    exponents = [[math.exp(math.erf(value / 64)) for value in row] for row in product]
    known = [[value / sum(row) for value in row] for row in exponents]
    _expect(np.allclose(found, known, rtol=1e-4), "a graph's output")


def _msgspec() -> None:
    import msgspec

    values = {"text": "ünïcode " * 99, "values": [1.5, -2e300, 7.0], "count": 1 << 60}
    for codec in (msgspec.json, msgspec.msgpack):
        _expect(codec.decode(codec.encode(values)) == values, codec.__name__)


def _safetensors() -> None:
    import numpy as np
    import safetensors.numpy

    tensor = np.arange(99, dtype=np.float32)
    loaded = safetensors.numpy.load(safetensors.numpy.save({"a": tensor, "b": np.zeros((3, 0), np.int64)}))
    _expect(loaded["a"].tolist() == tensor.tolist() and loaded["b"].shape == (3, 0), "what was saved")


def _psutil() -> None:
    import psutil

    _expect(0 < psutil.Process().memory_info().rss < psutil.virtual_memory().total, "memory_info")


def _paho() -> None:
    from paho.mqtt.client import Client
    from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
    from paho.mqtt.packettypes import PacketTypes
    from paho.mqtt.properties import Properties

    Client(CallbackAPIVersion.VERSION2, client_id="doctor", protocol=MQTTProtocolVersion.MQTTv5)
    properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
    properties.MaximumPacketSize = 1 << 17
    read = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
    read.unpack(properties.pack())  # type: ignore[no-untyped-call]
    _expect(read.json() == {"MaximumPacketSize": 1 << 17}, "a packet's properties")  # type: ignore[no-untyped-call]


def _pynacl() -> None:
    from nacl.signing import SigningKey

    # RFC 8032, section 7.1, test 2.
    key = SigningKey(bytes.fromhex("4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb"))
    signature = key.sign(b"r").signature
    _expect(signature.hex().startswith("92a009a9f0d4cab8720e820b5f642540"), "a signature")
    key.verify_key.verify(b"r", signature)


def _cryptography() -> None:
    from cryptography import x509

    from fleetune.edge.agent.csr import make_csr

    _, csr = make_csr("doctor")
    _expect(x509.load_pem_x509_csr(csr.encode()).is_signature_valid, "a certificate signing request")


def _yaml() -> None:
    import yaml

    text = "fleet: lab\ndevices: [{id: cam-01, memory: 1.5}]\n"
    _expect(yaml.safe_load(text) == {"fleet": "lab", "devices": [{"id": "cam-01", "memory": 1.5}]}, "what was parsed")


def _tuf() -> None:
    from tuf.api.metadata import Metadata, Timestamp

    found = Metadata[Timestamp].from_bytes(Metadata(Timestamp(version=7)).to_bytes())
    _expect(found.signed.version == 7, "metadata that were written")


KERNELS: dict[str, Callable[[], None]] = {
    "numpy": _numpy,
    "onnxruntime": _onnxruntime,
    "msgspec": _msgspec,
    "safetensors": _safetensors,
    "psutil": _psutil,
    "paho-mqtt": _paho,
    "pynacl": _pynacl,
    "cryptography": _cryptography,
    "pyyaml": _yaml,
    "tuf": _tuf,
}
"""Package of the plain install → its computation, which raises what goes wrong."""


if __name__ == "__main__":
    KERNELS[sys.argv[1]]()
