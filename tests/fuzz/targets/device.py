"""What a device reads from its own disk: its state, its pack, its samples, its model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import msgspec
import numpy as np
import safetensors.numpy

from fleetune.edge.agent.state import Counters, JobStore, RunRecord, State
from fleetune.edge.engine.dataset import read_dataset
from fleetune.edge.engine.entry import FILE as ENTRY_FILE
from fleetune.edge.engine.entry import HIDDEN, POOLED, Entry, StoredPrefix, what_is_wrong
from fleetune.edge.engine.expert import Expert, Layout
from fleetune.edge.engine.model import Model
from fleetune.edge.engine.parameters import initial
from fleetune.edge.engine.sessions import Sessions
from fleetune.edge.methods.pfedmoe.gate import gate_of
from fleetune.edge.methods.pfedmoe.mixture import HEADER
from fleetune.edge.methods.pfedmoe.model import SharedModel
from fleetune.edge.methods.unfinished import Unfinished
from fleetune.edge.pack.manifest import FILE as PACK_FILE
from fleetune.edge.pack.manifest import MAX_EXTRACTOR, WEIGHTS_FILE, File
from fleetune.edge.pack.pack import Pack
from fleetune.edge.pack.tensorfile import TensorFile
from fleetune.edge.pack.weights import Weights
from fleetune.edge.pack.wordpiece import WordPiece
from fleetune.edge.protocol.codec import Codec, read_exact
from fleetune.edge.protocol.errors import (
    BudgetError,
    ConfigError,
    DataError,
    MessageError,
    ModelError,
    PackError,
)
from fleetune.edge.protocol.messages import encode
from fleetune.edge.protocol.modelfile import FILE as MODEL_FILE
from fleetune.edge.protocol.modelfile import Card, GateKind
from fleetune.edge.resources.costs import Costs, read_costs
from fleetune.edge.resources.limits import Budget
from fleetune.edge.resources.planner import choose
from fleetune.edge.resources.trial import Trial
from fleetune.edge.resources.workload import Workload
from fuzz.documents import DATA, EXTRACTOR, MANIFEST, SHARING, TENSORS, UPDATE, VOCABULARY, WEIGHTS, write_pack
from fuzz.mutations import from_seeds, mutate_bytes, mutate_json, mutate_tensors, of_lines
from fuzz.target import MIB, Target

# --- state ------------------------------------------------------------------------------------------------------

COUNTERS = encode(Counters(5, 1 << 40, 3, [RunRecord(f"r{n}", {"fedms": n}) for n in range(4)]))


def counters(data: bytes, folder: Path) -> None:
    (folder / "outside").mkdir()
    (folder / "state").mkdir()
    (folder / "state" / "counters.json").write_bytes(data)
    state = State(folder / "state", "nano-1")
    try:
        for number in range(6):
            state.enter(f"new-{number}")
        state.counters.boot += 1
        state.save_counters()
    finally:
        state.close()
    assert {path.name for path in folder.iterdir()} == {"outside", "state"}


LOST = Codec.named("f32").encode(TENSORS)
OUTBOX = encode(UPDATE) + b"\n" + DATA + LOST


def outbox(data: bytes, folder: Path) -> None:
    place = folder / "state" / "outbox"
    place.mkdir(parents=True)
    (place / "r-fedms-3.update").write_bytes(data)
    state = State(folder / "state", "nano-1")
    try:
        for manifest in state.outbox():
            state.outbox_data(manifest)
            state.lost(manifest.run, manifest.job)
            state.acknowledge(manifest.update)
        state.put_outbox(UPDATE, DATA, LOST)
        assert state.outbox_data(UPDATE) == DATA
    finally:
        state.close()


def owner(data: bytes, folder: Path) -> None:
    (folder / "device").write_bytes(data)
    State(folder, "nano-1").close()


def kept_globals(data: bytes, folder: Path) -> None:
    """Under the name of their own hash, as a broadcast that is no good is not kept, but a disk may hold anything."""
    sha256 = hashlib.sha256(data).hexdigest()
    (folder / "globals").mkdir()
    (folder / "globals" / f"{sha256}.safetensors").write_bytes(data)
    state = State(folder, "nano-1")
    try:
        assert all(np.isfinite(tensor).all() for tensor in state.load_globals(sha256).values())
        with suppress(MessageError):
            state.load_globals("0" * 64)
    finally:
        state.close()


LAYOUT = Layout.of(MANIFEST, 3)
UNFINISHED = safetensors.numpy.save({**Expert.initial(LAYOUT, 0).tensors, "place": np.array([4, 9])})


def unfinished(data: bytes, folder: Path) -> None:
    (folder / "unfinished.safetensors").write_bytes(data)
    assert Unfinished(JobStore(folder, "r", "fedms"), 4).load(Expert(LAYOUT)) >= 0


LENGTHS = np.array([3, 5, 4])
BLANK = Entry.blank("k", "f16", 1, LENGTHS, 8)


def _entry() -> bytes:
    files = {
        name: File(file.bytes, hashlib.sha256(bytes(file.bytes)).hexdigest()) for name, file in BLANK.files.items()
    }
    return encode(msgspec.structs.replace(BLANK, files=files))


def entry(data: bytes, folder: Path) -> None:
    description, _, hidden = data.partition(b"\n\n")
    (folder / ENTRY_FILE).write_bytes(description)
    (folder / HIDDEN).write_bytes(hidden if hidden else bytes(BLANK.files[HIDDEN].bytes))
    (folder / POOLED).write_bytes(bytes(BLANK.files[POOLED].bytes))
    if what_is_wrong(folder, BLANK) is None:
        found = StoredPrefix(folder, BLANK, LENGTHS)
        assert found.pooled.shape == (3, 8)
        for hidden_states, _ in found.parts([np.arange(3)]):
            assert np.isfinite(hidden_states).all()


# --- pack -------------------------------------------------------------------------------------------------------


def pack_manifest(data: bytes, folder: Path) -> None:
    for stem in SHARING.graphs:
        (folder / f"{stem}.onnx").write_bytes(stem.encode())
    (folder / WEIGHTS_FILE).write_bytes(WEIGHTS)
    (folder / "vocab.txt").write_bytes(VOCABULARY)
    (folder / PACK_FILE).write_bytes(data)
    pack = Pack.open(folder)
    assert pack.manifest.longest > 0
    pack.weights().block(0)
    if pack.manifest.extractor is not None:
        assert len(initial(pack.manifest.extractor.shapes, 0).vector) <= MAX_EXTRACTOR


def weights(data: bytes, folder: Path) -> None:
    (folder / WEIGHTS_FILE).write_bytes(data)
    found = Weights(folder / WEIGHTS_FILE, MANIFEST)
    buffers = found.block(0)
    found.block(1, buffers if all(name in buffers for name in found.block(1)) else None)
    found.outer("positions.table")
    found.rows("tokens.table", np.array([[0, 1], [18, 2]]))


def mapped(data: bytes, folder: Path) -> None:
    (folder / "x.safetensors").write_bytes(data)
    found = TensorFile(folder / "x.safetensors")
    for name in found:
        np.asarray(found[name]).tobytes()


def exact(data: bytes, _folder: Path) -> None:
    for tensor in read_exact(data).values():
        assert np.isfinite(tensor).all()


def vocabulary(data: bytes, folder: Path) -> None:
    words, _, text = data.partition(b"\n\n\n")
    (folder / "vocab.txt").write_bytes(words)
    tokens = WordPiece(folder / "vocab.txt", lowercase=bool(len(text) % 2), max_length=12)
    for line in (text.decode(errors="surrogateescape"), "a film"):
        ids = tokens.encode(line)
        assert len(ids) <= 12
        assert all(0 <= number <= words.count(b"\n") + 1 for number in ids)


# --- samples ----------------------------------------------------------------------------------------------------

ROWS = "\n".join(
    json.dumps({"text": f"a film {n}", "label": n % 3, "split": ("train", "val", "test")[n % 3]}) for n in range(6)
).encode()
PICTURES = safetensors.numpy.save(
    {
        "images": np.arange(4 * 9 * 7, dtype=np.uint8).reshape(4, 9, 7),
        "labels": np.array([0, 1, 2, 0]),
        "split": np.array([0, 1, 2, 0], np.uint8),
    }
)


class _Table:
    """Embeds every token alike."""

    def token_rows(self, ids: np.ndarray) -> np.ndarray:
        return np.zeros((*ids.shape, 4), np.float32)


def texts(data: bytes, folder: Path) -> None:
    pack = write_pack(folder / "pack")
    (folder / "data.jsonl").write_bytes(data)
    found = read_dataset(folder / "data.jsonl", pack)
    assert found.rows(_Table(), np.arange(len(found))).ndim == 3
    assert found.classes <= 4096
    found.check_labels(np.arange(len(found)), 3, "the job", "label them")


def pictures(data: bytes, folder: Path) -> None:
    pack = write_pack(folder / "pack", image=True)
    (folder / "data.safetensors").write_bytes(data)
    found = read_dataset(folder / "data.safetensors", pack)
    assert found.rows(_Table(), np.arange(min(len(found), 2))).shape[1:] == (5, 588)


# --- models, costs ----------------------------------------------------------------------------------------------

CARD = Card(
    kit="0.1.0", kind="mixture", job="fedms", run="r", pack="12" * 32, weights=MANIFEST.files[WEIGHTS_FILE].sha256,
    backbone="cd" * 32, blocks=2, rank=2, targets=("query",), classes=3, boundary=1, mix="logits",
)  # fmt: skip


def _model() -> bytes:
    expert = Expert.initial(LAYOUT, 0)
    tensors = {f"{part}.{name}": tensor for part in ("global", "local") for name, tensor in expert.tensors.items()}
    gate = {"gate.A": (64, 4), "gate.B": (4, 64), "gate.weight": (64, 2), "gate.bias": (2,)}
    tensors |= {name: np.zeros(shape, np.float32) for name, shape in gate.items()}
    data: bytes = safetensors.numpy.save(tensors, {"fleetune": encode(CARD).decode()})
    return data


def model(data: bytes, folder: Path) -> None:
    (folder / MODEL_FILE).write_bytes(data)
    found = Model.read(folder / MODEL_FILE, Pack(folder, MANIFEST, "12" * 32))
    features = np.ones((2, 64), np.float32)
    for name in ("global", "local"):
        expert = found.choose(name)[1]
        assert isinstance(expert, Expert)
        assert expert.logits(features).shape == (2, found.card.classes)
    found.write(folder / "again.safetensors")


def _shared_model(gate: GateKind) -> bytes:
    pack = Pack(Path(), SHARING, "12" * 32)
    card = msgspec.structs.replace(CARD, kind="pfedmoe", job="pfedmoe", extractor=EXTRACTOR.sha256, gate=gate)
    width = EXTRACTOR.representation
    model = SharedModel(
        card,
        initial(EXTRACTOR.shapes, 0),
        Expert.initial(Layout.of(SHARING, width), 0),
        initial(dict(zip(HEADER, ((width, card.classes), (card.classes,)), strict=True)), 0),
        gate_of(gate, Sessions(pack.path, 1), SHARING.width, EXTRACTOR.gate, width, seed=0),
    )
    data: bytes = safetensors.numpy.save(dict(model.parts), {"fleetune": encode(card).decode()})
    return data


def shared_model(data: bytes, folder: Path) -> None:
    (folder / MODEL_FILE).write_bytes(data)
    found = SharedModel.read(folder / MODEL_FILE, Pack(folder, SHARING, "12" * 32), Sessions(folder, 1))
    assert all(np.isfinite(tensor).all() for tensor in found.parts.values())
    found.write(folder / "again.safetensors")


def costs_file() -> bytes:
    cells = [(d, m, n, r) for d in (1, 2) for m in (2, 16) for n in (8, 16) for r in (False, True)]
    trials = tuple(
        Trial(d, m, n, r, 60.0, 61.0, 70.0 + d * m * n / 100, 0.01 * d, 0.02 * d, 0.005, 0.01) for d, m, n, r in cells
    )
    return encode(Costs("p", "0.1.0", "1.23", "arm", 1, "4 cores, 1479 MHz", trials))


def costs(data: bytes, folder: Path) -> None:
    (folder / "costs.json").write_bytes(data)
    found = read_costs(folder / "costs.json")
    pack = Pack(folder, MANIFEST, found.pack)
    lengths = np.array([8, 16, 12, 9])
    workload = Workload.of_lengths(lengths, lengths, MANIFEST, epochs=1, batch=4, max_depth=2)
    if not found.stale(pack, length=16, here=False):
        assert found.model.growth_mib(1, 1, 1, recompute=found.trials[0].recompute) > -1e12
        choose(found, workload, Budget(512.0))


LINES: Callable[..., bytes] = of_lines(mutate_json)
TARGETS = [
    Target("counters", from_seeds([COUNTERS], mutate_json, mutate_bytes), counters, (ConfigError,)),
    Target("outbox", from_seeds([OUTBOX], LINES, LINES, mutate_bytes), outbox, (ConfigError,), slow=True),
    Target("state's owner", from_seeds([b"nano-1"], mutate_bytes), owner, (ConfigError, OSError)),
    Target("kept globals", from_seeds([LOST], mutate_tensors, mutate_bytes), kept_globals, (MessageError,)),
    Target(
        "unfinished round",
        from_seeds([UNFINISHED], mutate_tensors, mutate_bytes),
        unfinished,
        (ConfigError, DataError),
    ),
    Target("cache entry", from_seeds([_entry()], mutate_json, mutate_bytes), entry, ()),
    Target(
        "pack manifest",
        from_seeds([encode(MANIFEST), encode(SHARING)], mutate_json, mutate_bytes),
        pack_manifest,
        (PackError,),
        slow=True,
    ),
    Target("pack weights", from_seeds([WEIGHTS], mutate_tensors, mutate_bytes), weights, (PackError,)),
    Target("mapped tensors", from_seeds([WEIGHTS, PICTURES], mutate_tensors, mutate_bytes), mapped, (PackError,)),
    Target("exact tensors", from_seeds([LOST], mutate_tensors, mutate_bytes), exact, (MessageError,)),
    Target("vocabulary", from_seeds([VOCABULARY + b"\n\nA film, abc!"], mutate_bytes), vocabulary, (PackError,)),
    Target("texts", from_seeds([ROWS], LINES, LINES, mutate_bytes), texts, (DataError,)),
    Target("pictures", from_seeds([PICTURES], mutate_tensors, mutate_bytes), pictures, (DataError,), memory=8 * MIB),
    Target("model file", from_seeds([_model()], mutate_tensors, mutate_bytes), model, (ModelError,)),
    Target(
        "shared model file",
        from_seeds([_shared_model("sample"), _shared_model("element")], mutate_tensors, mutate_bytes),
        shared_model,
        (ModelError,),
    ),
    Target(
        "costs",
        from_seeds([costs_file()], mutate_json, mutate_bytes),
        costs,
        (ConfigError, BudgetError),
        memory=8 * MIB,
    ),
]
