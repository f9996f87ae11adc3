"""Small changes to good inputs: of bytes, of JSON, of a safetensors file, of lines, of YAML."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from fuzz.choices import Choices

Mutation = Callable[[Choices, bytes], bytes]

_CHANGES = [1, 1, 1, 1, 2, 3]
"""Few, or nothing of an input would be good enough to be read on."""

NUMBERS = [0, 1, 7, 8, 64, 127, 128, 255, 256, 1023, 65535, 65536, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**64 - 1]
"""Where something may overflow."""

TOKENS = [
    *("null", "true", "false", "0", "1", "2", "-1", "3.5", "-0.0", "1e300", "-1e308", "1e999", "NaN", "Infinity"),
    *map(str, (2**31, 2**53, 2**53 + 1, -(2**53), 2**63 - 1, 2**63, 2**64, 10**30, -(10**300))),
    "1" + "0" * 400,
    *(
        '""',
        '"x"',
        '"../../x"',
        '"/etc/passwd"',
        '".."',
        '"a\\u0000b"',
        '"\\ud800"',
        '"\\n\\u001b[2J"',
        '"F32"',
        '"I64"',
    ),
    json.dumps("y" * 1100),
    *("[]", "{}", "[[]]", '{"":{}}', "[0,8]", "[1099511627776,1099511627776]", "[-1]", "[0,0,0,0,0,0,0,0,0,0]"),
    "[" * 40 + "]" * 40,
    "[" + ",".join(["0"] * 200) + "]",
    "[" * 3000,
]
"""Values that a careless reader trips over, as JSON writes them; some are no JSON."""

SCALARS = [
    *(
        "~",
        "''",
        "-1",
        "0",
        "1e400",
        ".inf",
        ".nan",
        "2001-99-99",
        "12:30:99",
        "0x",
        "!!int ''",
        "!!bool x",
        "!!set {a}",
    ),
    *(
        "&a [*a]",
        "*b",
        "&b {c: *b}",
        "<<: *b",
        "!!python/name:os.system",
        "[" * 50,
        "{a: b, a: c}",
        "1" * 5000,
        "\t",
        "- -",
    ),
    *(
        "1GiB",
        "1e9MiB",
        "0MiB",
        "99999999999999999999GiB",
        "null",
        "true",
        "../../etc/passwd",
        "'\\n'",
        '"\\e[2J"',
        "|",
        ">-",
    ),
]
"""The same as YAML writes them."""


def mutate_bytes(choices: Choices, data: bytes) -> bytes:
    """Change, insert, repeat or drop some bytes."""
    at = choices.below(len(data) + 1)
    kind = choices.below(8)
    if kind == 0 and data:
        at = min(at, len(data) - 1)
        return data[:at] + bytes([data[at] ^ 1 << choices.below(8)]) + data[at + 1 :]
    if kind == 1:
        return data[:at] + bytes([choices.below(256)]) + data[at + 1 :]
    if kind == 2:
        return data[:at] + choices.take(1 + choices.below(12)) + data[at:]
    if kind == 3:
        return data[:at] + data[at + 1 + choices.below(32) :]
    if kind == 4:
        return data[:at]
    if kind == 5:
        return data[:at] + data[at : at + 1 + choices.below(64)] * (2 + choices.below(6)) + data[at:]
    if kind == 6:
        size = choices.pick([1, 2, 4, 8])
        number = choices.pick(NUMBERS) % (1 << 8 * size)
        return data[:at] + number.to_bytes(size, choices.pick(["little", "big"])) + data[at + size :]
    return data + choices.take(1 + choices.below(16))


class _Token(str):
    """JSON as it is to be written, or what is none."""


class _Pairs(list[Any]):
    """An object whose names need not differ."""


def _load(raw: bytes) -> Any:
    return json.loads(raw, object_pairs_hook=lambda pairs: _Pairs(list(pair) for pair in pairs))


def _dump(value: Any) -> str:
    if isinstance(value, _Token):
        return str(value)
    if isinstance(value, _Pairs):
        return "{" + ",".join(f"{_dump(name)}:{_dump(some)}" for name, some in value) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_dump, value)) + "]"
    return json.dumps(value)


def _places(value: Any) -> list[tuple[list[Any], int]]:
    """Each container and number of its parts, the outer ones first."""
    found, pending = list[tuple[list[Any], int]](), [value]
    for some in pending:
        if isinstance(some, list):
            found += [(some, index) for index in range(len(some))]
            pending += [part[1] for part in some] if isinstance(some, _Pairs) else some
    return found


def mutate_json(choices: Choices, raw: bytes) -> bytes:
    """Replace, drop, double or rename a part of a document; what is no JSON is changed as bytes."""
    try:
        document = _load(raw)
    except (ValueError, RecursionError):
        return mutate_bytes(choices, raw)
    for _ in range(choices.pick(_CHANGES)):
        places = _places(document)
        if not places:
            return choices.pick(TOKENS).encode()
        container, index = choices.pick(places)
        kind, token = choices.below(6), _Token(choices.pick(TOKENS))
        named = isinstance(container, _Pairs)
        if kind <= 1:
            container[index] = [container[index][0], token] if named else token
        elif kind == 2:
            del container[index]
        elif kind == 3:
            container.insert(choices.below(len(container) + 1), container[index])
        elif kind == 4 and named:
            other = choices.pick(places)[0]
            name = choices.pick([pair[0] for pair in other]) if isinstance(other, _Pairs) and other else token
            container[index] = [name if isinstance(name, str) else token, container[index][1]]
        else:
            other, place = choices.pick(places)
            part = other[place][1] if isinstance(other, _Pairs) else other[place]
            copy = _Token(_dump(part))  # or it could come to lie inside of itself
            container[index] = [container[index][0], copy] if named else copy
    return _dump(document).encode("utf-8", "surrogatepass")


def mutate_sealed(choices: Choices, raw: bytes) -> bytes:
    """Change what an envelope holds, mostly so that its hash is right."""
    try:
        envelope = json.loads(raw)
        body = mutate_json(choices, json.dumps(envelope["body"]).encode())
    except (ValueError, LookupError, TypeError, RecursionError):  # by a change before this one
        return mutate_bytes(choices, raw)
    if choices.often():
        envelope["sha256"] = hashlib.sha256(body).hexdigest()
    rest = json.dumps({name: value for name, value in envelope.items() if name != "body"})
    sealed = b'{"body":' + body + b"," + rest.encode()[1:]
    return sealed if choices.often() else mutate_json(choices, sealed)


def mutate_tensors(choices: Choices, data: bytes) -> bytes:
    """Change the header of a safetensors file, mostly so that its length is right, or what follows it."""
    length = int.from_bytes(data[:8], "little")
    header, body = data[8 : 8 + length], data[8 + length :]
    kind = choices.below(8)
    if kind < 5:
        header = mutate_json(choices, header)
    elif kind == 5:
        header = mutate_bytes(choices, header)
    elif kind == 6:
        body = mutate_bytes(choices, body)
    else:
        header += b" " * choices.below(3000)
    length = len(header) if choices.often() else choices.pick(NUMBERS)
    return length.to_bytes(8, "little") + header + body


def compressed(mutation: Mutation) -> Mutation:
    """A change to what was compressed, mostly, or else to the compressed bytes."""

    def mutate(choices: Choices, data: bytes) -> bytes:
        if choices.often():
            with suppress(zlib.error):  # by a change before this one
                return zlib.compress(mutation(choices, zlib.decompress(data)), 1)
        return mutate_bytes(choices, data)

    return mutate


def of_lines(mutation: Mutation) -> Mutation:
    """A change to one line, or to their order."""

    def mutate(choices: Choices, data: bytes) -> bytes:
        lines = data.split(b"\n")
        index, kind = choices.below(len(lines)), choices.below(8)
        if kind == 0:
            del lines[index]
        elif kind == 1:
            lines.insert(choices.below(len(lines) + 1), lines[index])
        elif kind == 2:
            lines[index] = mutate_bytes(choices, lines[index])
        else:
            lines[index] = mutation(choices, lines[index])
        return b"\n".join(lines)

    return mutate


def mutate_yaml(choices: Choices, data: bytes) -> bytes:
    """Put something odd in a value's place, before it or after it."""
    lines = data.split(b"\n")
    index = choices.below(len(lines))
    name, colon, value = lines[index].partition(b":")
    odd = choices.pick(SCALARS).encode()
    kind = choices.below(8)
    if kind <= 1:
        lines[index] = name + colon + b" " + choices.pick(lines).partition(b":")[2].strip()
    elif kind <= 3:
        lines[index] = name + colon + b" " + odd
    elif kind == 4:
        lines[index] = name + colon + b" &b" + value
    elif kind == 5:
        lines.insert(index, b" " * choices.below(9) + odd)
    else:
        return of_lines(mutate_bytes)(choices, data)
    return b"\n".join(lines)


def from_seeds(seeds: Sequence[bytes], *mutations: Mutation) -> Callable[[Choices], bytes]:
    """An input: a good one with a few changes, or now and then nothing but bytes."""

    def make(choices: Choices) -> bytes:
        if choices.spent:
            return seeds[0]
        if choices.below(16) == 15:
            return choices.rest()
        data = choices.pick(seeds)
        for _ in range(choices.pick(_CHANGES)):
            data = choices.pick(mutations)(choices, data)
        return data

    return make
