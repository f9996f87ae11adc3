"""Every wheel that a device installs is imported, and each compiled one does something."""

from __future__ import annotations

import importlib.metadata
import json

import pytest

from emulated.device import Device

pytestmark = [pytest.mark.emulated, pytest.mark.slow]

USES = {
    "cffi": """
import cffi
ffi = cffi.FFI()
ffi.cdef("size_t strlen(const char *text);")
assert ffi.dlopen(None).strlen(b"fleet") == 5
""",
    "cryptography": """
from cryptography import x509
from fleetune.edge.agent.csr import make_csr
key, csr = make_csr("nano-1")
assert x509.load_pem_x509_csr(csr.encode()).is_signature_valid
""",
    "iotcore": """
import iotcore, socket
with socket.create_server(("127.0.0.1", 0)) as free:
    port = free.getsockname()[1]
broker = iotcore.Broker(port=port, listen="127.0.0.1").start(timeout=100.0)
socket.create_connection(("127.0.0.1", port)).close()
broker.stop()
""",
    "msgspec": """
import msgspec
Row = msgspec.defstruct("Row", [("text", str), ("values", list[float])])
row = Row("ünïcode " * 99, [1.5, -2e300, 7.0])
assert msgspec.json.decode(msgspec.json.encode(row), type=Row) == row
assert msgspec.msgpack.decode(msgspec.msgpack.encode(row), type=Row) == row
""",
    "numpy": """
import numpy as np
rng = np.random.default_rng(0)
a = rng.standard_normal((65, 65))
for dtype in (np.float16, np.float32, np.float64, np.complex128):
    assert np.isfinite(abs((a @ a).astype(dtype) + np.exp(a.astype(dtype) / 9)).sum())
assert np.allclose(np.linalg.inv(a) @ a, np.eye(65), atol=1e-6)
assert np.allclose(np.fft.ifft(np.fft.fft(a)), a)
assert (np.sort(a.astype(np.int16), axis=None) == sorted(a.astype(np.int16).reshape(-1))).all()
""",
    "onnxruntime": """
import numpy as np, onnxruntime as ort
names = ort.get_available_providers()
assert "CPUExecutionProvider" in names, names
value = ort.OrtValue.ortvalue_from_numpy(np.arange(6, dtype=np.float32))
assert value.numpy().sum() == 15
""",
    "protobuf": """
from google.protobuf import struct_pb2
from google.protobuf.internal import api_implementation
assert api_implementation.Type() == "upb", api_implementation.Type()
message = struct_pb2.Struct()
message.update({"number": 1.5, "text": "a", "list": [1, 2]})
assert struct_pb2.Struct.FromString(message.SerializeToString()) == message
""",
    "psutil": """
import psutil
assert psutil.Process().memory_info().rss > 0
assert psutil.virtual_memory().total > 0
""",
    "pynacl": """
from nacl.signing import SigningKey
key = SigningKey.generate()
key.verify_key.verify(b"fleet", key.sign(b"fleet").signature)
""",
    "pyyaml": """
import yaml
assert yaml.load("a: [1, 2.5, x]", yaml.CSafeLoader) == {"a": [1, 2.5, "x"]}
""",
    "safetensors": """
import numpy as np, safetensors.numpy
tensors = {"a": np.arange(99, dtype=np.float32), "b": np.zeros((3, 0), np.int64)}
loaded = safetensors.numpy.load(safetensors.numpy.save(tensors))
assert all((loaded[name] == tensor).all() for name, tensor in tensors.items())
""",
}
"""Distribution with compiled code → a few lines that run some of it. The engine's graphs run in test_training.py."""

IMPORT = """\
import importlib, json, sys
for name in json.loads(sys.argv[1]):
    importlib.import_module(name)
"""

FOREIGN = {"isympy"}
"""A shell that its wheel brings along as a module."""


def distributions(device: Device) -> dict[str, importlib.metadata.Distribution]:
    found = importlib.metadata.distributions(path=[str(device.site)])
    return {distribution.metadata["Name"].lower(): distribution for distribution in found}


def files(distribution: importlib.metadata.Distribution) -> list[importlib.metadata.PackagePath]:
    return [file for file in distribution.files or [] if ".." not in file.parts]


def test_the_device_has_the_pinned_versions_and_nothing_else(device: Device) -> None:
    found = {name: distribution.version for name, distribution in distributions(device).items()}
    assert found == {name: device.pinned[name.replace("_", "-")] for name in found}
    assert {"onnxruntime", "numpy", "msgspec", "paho-mqtt", "psutil", "pynacl", "pyyaml", "safetensors"} <= found.keys()


def test_every_package_imports(device: Device) -> None:
    names = {
        file.parts[0].partition(".")[0]
        for distribution in distributions(device).values()
        for file in files(distribution)
        if file.suffix in (".py", ".so") and file.parts[0].partition(".")[0].isidentifier()
    }
    assert len(names) > 8
    done = device.run("-c", IMPORT, json.dumps(sorted(names - FOREIGN)))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", USES)
def test_a_compiled_package_works(device: Device, name: str) -> None:
    done = device.run("-c", USES[name])
    assert done.returncode == 0, done.stderr


def test_no_compiled_package_is_forgotten(device: Device) -> None:
    compiled = {
        name
        for name, distribution in distributions(device).items()
        if any(".so" in file.suffixes for file in files(distribution))
    }
    assert compiled == USES.keys()
