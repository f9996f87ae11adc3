"""Reads YAML into frozen structs; an error names the file, the line, the field and the value."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import msgspec
import yaml

from fleetune.edge.protocol.errors import ConfigError, field_and_reason
from fleetune.edge.protocol.files import read_bytes, write_atomic

_MAX_FILE = 1 << 20
_MAX_NODES = 1 << 18
_MAX_DEPTH = 32
_MAX_SHOWN = 80
"""Characters of what a file says that an error repeats."""

_STEP = re.compile(r"([^.\[\]]+)|\[(\d+)\]")
_UNKNOWN = re.compile(r"unknown field `([^`]*)`")
_SIZE = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)\s*(MiB|GiB)")

T = TypeVar("T")


class Size(str):
    """An amount of memory as its writer wrote it, such as ``1536MiB`` or ``2GiB``.

    Args:
        value: What was found in its place.

    Raises:
        ValueError: The unit is missing or unknown, or the size is zero.
    """

    mib: float

    def __new__(cls, value: object) -> Size:
        """Check what was found, and convert it."""
        match = _SIZE.fullmatch(value.strip()) if isinstance(value, str) else None
        if match is None:
            raise ValueError("Expected a size with its unit, such as 1536MiB or 2GiB")
        if not float(match[1]):
            raise ValueError("Expected a size above zero")
        size = super().__new__(cls, match[0])
        size.mib = float(match[1]) * (1024 if match[2] == "GiB" else 1)
        return size


def read_size(option: str, value: str) -> Size:
    """A size from the command line.

    Raises:
        ConfigError: It is none.
    """
    try:
        return Size(value)
    except ValueError as error:
        raise ConfigError(f"{option}: {value!r}: {error}", "write it as 1536MiB or 2GiB") from error


@dataclass(frozen=True)
class Document(Generic[T]):
    """A file that fits its schema.

    Attributes:
        path: The file.
        value: What it says.
    """

    path: Path
    value: T
    _tree: yaml.Node | None

    def where(self, field: str) -> str:
        """File, line and field, for the beginning of an error."""
        return _where(self.path, self._tree, field)


def read_yaml(path: Path, kind: type[T], remedy: str) -> Document[T]:
    """Read a file.

    Args:
        path: The file.
        kind: A msgspec struct; its fields may be of the type :class:`Size`.
        remedy: What to do when the file does not fit, such as where an example is.

    Raises:
        ConfigError: The file is missing, too large, not YAML, or does not fit ``kind``.
    """
    try:
        if path.stat().st_size > _MAX_FILE:
            raise ConfigError(f"{path} is larger than {_MAX_FILE} bytes", remedy)
        text = read_bytes(path, _MAX_FILE).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}", remedy) from error
    try:
        loader = yaml.SafeLoader(text)
        tree = loader.get_single_node()
        _refuse_odd_nodes(tree, loader, path, remedy)
        found = None if tree is None else loader.construct_document(tree)
        return Document(path, msgspec.convert(found, kind, dec_hook=_convert), tree)
    except RecursionError as error:
        raise ConfigError(f"{path}: nested too deeply", remedy) from error
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{path}{line}: not YAML: {error.problem}", remedy) from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}", remedy) from error
    except msgspec.ValidationError as error:
        field, reason = field_and_reason(error)
        if unknown := _UNKNOWN.search(reason):
            field = f"{field}.{unknown[1]}".lstrip(".")
            raise ConfigError(f"{_where(path, tree, field)}: there is no such field", remedy) from error
        node = _find(tree, field)
        value = f", found {node.value[:_MAX_SHOWN]!r}" if isinstance(node, yaml.ScalarNode) else ""
        raise ConfigError(f"{_where(path, tree, field)}: {reason}{value}", remedy) from error
    except ValueError as error:  # such as the 32nd of a month, or a number of thousands of digits
        raise ConfigError(f"{path}: a value that is none: {error}", remedy) from error


def write_yaml(path: Path, value: msgspec.Struct, head: str) -> None:
    """Write a struct, atomically, as :func:`to_yaml` has it."""
    write_atomic(path, to_yaml(value, head))


def to_yaml(value: msgspec.Struct, head: str) -> bytes:
    """A struct as a file that :func:`read_yaml` reads; what is absent or empty is left out.

    Args:
        value: The struct.
        head: A comment for its first line.
    """
    text: str = yaml.safe_dump(
        _plain(msgspec.to_builtins(value, enc_hook=str)),
        sort_keys=False,
        default_flow_style=None,
        allow_unicode=True,
        width=1000,
    )
    return f"# {head}\n{text}".encode()


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(some) for key, some in value.items() if some is not None and some not in ((), [])}
    if isinstance(value, list | tuple):
        return [_plain(some) for some in value]
    return str(value) if isinstance(value, str) else float(f"{value:.6g}") if isinstance(value, float) else value


def _convert(kind: type, value: Any) -> object:
    if kind is Size:
        return Size(value)
    raise NotImplementedError(f"no conversion to {kind}")


def _where(path: Path, tree: yaml.Node | None, field: str) -> str:
    node = _find(tree, field)
    line = f", line {node.start_mark.line + 1}" if node is not None else ""
    return f"{path}{line}{f': field {field}' if field else ''}"


def _refuse_odd_nodes(tree: yaml.Node | None, loader: yaml.SafeLoader, path: Path, remedy: str) -> None:
    """Refuse what is YAML and yet no file of ours: equal keys, tags, and aliases that mean more than memory holds.

    An alias stands for all that its anchor holds, so nodes are counted as often as they are meant.
    """
    sizes, above, stack = dict[int, int](), set[int](), [tree] if tree is not None else []
    while stack:
        node, why = stack[-1], ""
        children = _children(node)
        if id(node) in sizes:
            stack.pop()
        elif id(node) in above:  # and all below it are counted
            above.remove(id(node))
            sizes[id(node)] = 1 + sum(sizes[id(child)] for child in children)
            why = f"more than {_MAX_NODES} values" if sizes[id(node)] > _MAX_NODES else ""
        else:
            above.add(id(node))
            stack += children
            nested = len(above) > _MAX_DEPTH or any(id(child) in above for child in children)
            why = "nested too deeply" if nested else _oddity(node, loader)
        if why:
            raise ConfigError(f"{path}, line {node.start_mark.line + 1}: {why}", remedy)


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return node.value if isinstance(node, yaml.SequenceNode) else []


def _oddity(node: yaml.Node, loader: yaml.SafeLoader) -> str:
    """What is wrong with a node by itself; empty if nothing is."""
    kind = type(node)
    plain = isinstance(node, yaml.ScalarNode) and node.style is None
    scalar = node.value if kind is yaml.ScalarNode else None
    if node.tag != loader.resolve(kind, scalar, (plain, not plain)):  # type: ignore[no-untyped-call]
        return f"the tag {node.tag[:_MAX_SHOWN]!r} has no meaning here"
    if isinstance(node, yaml.MappingNode):  # YAML takes the last of two equal keys in silence
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twins = [key for key, count in Counter(keys).items() if count > 1]
        if twins:
            return f"{twins[0][:_MAX_SHOWN]!r} is there twice"
    return ""


def _find(node: yaml.Node | None, field: str) -> yaml.Node | None:
    """The node of a field such as ``devices[0].id``, or the nearest one above it. A key may hold dots itself."""
    for step in _STEP.finditer(field):
        following = None
        if isinstance(node, yaml.MappingNode):
            values = {key.value: value for key, value in node.value if isinstance(key, yaml.ScalarNode)}
            following = values.get(field[step.start() :], values.get(step[1]))
        elif isinstance(node, yaml.SequenceNode) and step[2] and int(step[2]) < len(node.value):
            following = node.value[int(step[2])]
        if following is None:
            break
        node = following
    return node
