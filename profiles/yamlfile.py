"""Reads YAML into frozen structs; an error names the file, the line, the field and the value."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TypeVar

import msgspec
import yaml

from fleetune.edge.protocol.errors import ConfigError

_MAX_FILE = 1 << 20
_WHERE = re.compile(r" - at `\$\.?(?P<path>[^`]*)`$")
_STEP = re.compile(r"([^.\[\]]+)|\[(\d+)\]")

T = TypeVar("T")


def read_yaml(path: Path, kind: type[T], remedy: str) -> T:
    """Read a file.

    Args:
        path: The file.
        kind: A msgspec struct.
        remedy: What to do when the file does not fit, such as where an example is.

    Raises:
        ConfigError: The file is missing, too large, not YAML, or does not fit ``kind``.
    """
    try:
        if path.stat().st_size > _MAX_FILE:
            raise ConfigError(f"{path} is larger than {_MAX_FILE} bytes", remedy)
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}", remedy) from error
    try:
        tree = yaml.compose(text, yaml.SafeLoader)
        _refuse_twins(tree, path, remedy)
        return msgspec.convert(yaml.safe_load(text), kind)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}", remedy) from error
    except msgspec.ValidationError as error:
        message = str(error)
        where = _WHERE.search(message)
        steps = [name or int(number) for name, number in _STEP.findall(where["path"])] if where else []
        node, field = _find(tree, steps), where["path"] if where else ""
        what = message[: where.start()] if where else message
        line = f", line {node.start_mark.line + 1}" if node is not None else ""
        value = f", found {node.value!r}" if isinstance(node, yaml.ScalarNode) else ""
        raise ConfigError(f"{path}{line}: {f'field {field}: ' if field else ''}{what}{value}", remedy) from error


def _refuse_twins(node: yaml.Node | None, path: Path, remedy: str) -> None:
    """YAML takes the last of two equal keys in silence."""
    pending, seen = [node], set[int]()
    while pending:
        node = pending.pop()
        if node is None or id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            pending += node.value
        elif isinstance(node, yaml.MappingNode):
            keys = set[str]()
            for key, value in node.value:
                if isinstance(key, yaml.ScalarNode) and key.value in keys:
                    raise ConfigError(f"{path}, line {key.start_mark.line + 1}: {key.value!r} is there twice", remedy)
                if isinstance(key, yaml.ScalarNode):
                    keys.add(key.value)
                pending.append(value)


def _find(node: yaml.Node | None, steps: list[str | int]) -> yaml.Node | None:
    """The node at a path, or the nearest one above it."""
    for step in steps:
        following = None
        if isinstance(node, yaml.MappingNode):
            following = next((value for key, value in node.value if key.value == step), None)
        elif isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
            following = node.value[step]
        if following is None:
            break
        node = following
    return node


_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(MiB|GiB)")


def parse_mib(text: str, where: str) -> float:
    """``1536MiB`` or ``2GiB`` → MiB.

    Raises:
        ConfigError: The unit is missing or unknown.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ConfigError(f"{where}: {text!r} is not a size", "write a number with its unit, such as 1536MiB or 2GiB")
    return float(match[1]) * (1024 if match[2] == "GiB" else 1)
