"""The file system that probes read, `/` or a sample of one, and what of it could not be read."""

from __future__ import annotations

import os
import re
from pathlib import Path

TEXT_LIMIT = 64 << 10
"""Bytes of a file that are read at most, unless a probe asks for another number."""

ENTRIES_LIMIT = 1024
"""Names of a folder that are looked at, at most."""

_NOTE_LIMIT = 120
_ABSENT = (FileNotFoundError, NotADirectoryError)
_DIGITS = re.compile(r"(\d+)")


class Tree:
    """Files below a root, read with a bound on their size.

    What a kernel does not have is None. A file that is there but cannot be read or understood is None as well, and is
    named in :attr:`skipped`, so that nobody takes it for absent.

    Args:
        root: Where `/` is; a folder with copies of `/proc` and `/sys` in tests.
    """

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = str(root).rstrip("/")
        self._skipped: dict[str, None] = {}

    @property
    def live(self) -> bool:
        """Whether this is the machine that we run on, so that system calls speak of it too."""
        return not self._root

    @property
    def skipped(self) -> tuple[str, ...]:
        """What could not be read so far, and why: ``/sys/class/thermal/thermal_zone3/temp: permission denied``."""
        return tuple(self._skipped)

    def skip(self, what: str, why: str) -> None:
        """Name something that could not be read."""
        self._skipped[f"{_short(what)}: {_short(why)}"] = None

    def path(self, path: str) -> Path:
        """Where an absolute path of the device lies."""
        return Path(f"{self._root}{path}")

    def text(self, path: str, limit: int = TEXT_LIMIT) -> str | None:
        """The file's text without space around it; None where there is no such file, or it was skipped."""
        try:
            with open(f"{self._root}{path}", "rb") as file:  # noqa: PTH123 - twice as fast, and probes read hundreds
                data = file.read(limit + 1)
        except _ABSENT:
            return None
        except (OSError, ValueError) as error:  # ValueError: a name from another file that holds a null byte
            self.skip(path, reason(error))
            return None
        if len(data) > limit:
            self.skip(path, f"more than {limit} bytes")
            return None
        return data.decode(errors="replace").strip()

    def integer(self, path: str, base: int = 10) -> int | None:
        """The only number in a file."""
        text = self.text(path)
        if text is None:
            return None
        value = integer(text, base)
        if value is None:
            self.skip(path, f"not a number: {text!r}")
        return value

    def counters(self, path: str, limit: int = TEXT_LIMIT) -> dict[str, int]:
        """Names and numbers of a file such as `/proc/meminfo` or `memory.events`; {} where it is not."""
        found, wrong = {}, []
        for line in (self.text(path, limit) or "").splitlines():
            name, _, rest = line.partition(" ")
            value = integer(rest.strip().removesuffix(" kB"))
            if value is None:
                wrong.append(line)
            else:
                found[name.rstrip(":")] = value
        if wrong:
            self.skip(path, f"not a name and a number: {wrong[0]!r}")
        return found

    def names(self, folder: str, expression: str) -> list[str]:
        """Names in a folder that match a regular expression, in the order of their numbers; [] where it is not."""
        found = []
        try:
            with os.scandir(f"{self._root}{folder}") as entries:
                for count, entry in enumerate(entries):
                    if count == ENTRIES_LIMIT:
                        self.skip(folder, f"more than {ENTRIES_LIMIT} entries")
                        break
                    if re.fullmatch(expression, entry.name):
                        found.append(entry.name)
        except _ABSENT:
            return []
        except (OSError, ValueError) as error:
            self.skip(folder, reason(error))
        return sorted(found, key=_natural)

    def link(self, path: str) -> str | None:
        """Last name of what a symbolic link points to; None where there is no such link."""
        try:
            return os.path.basename(os.readlink(f"{self._root}{path}"))  # noqa: PTH115, PTH119 - as above
        except _ABSENT:
            return None
        except (OSError, ValueError) as error:
            self.skip(path, reason(error))
            return None

    def modified_s(self, path: str) -> float | None:
        """When a file was last changed, in seconds since 1970; None where there is no such file."""
        try:
            return self.path(path).stat().st_mtime
        except _ABSENT:
            return None
        except (OSError, ValueError) as error:
            self.skip(path, reason(error))
            return None

    def has(self, path: str) -> bool:
        """Whether there is such a file or folder, readable or not."""
        try:
            return self.path(path).exists()
        except OSError as error:
            self.skip(path, reason(error))
            return False


def reason(error: Exception) -> str:
    """Why a file could not be read, in the system's words: ``permission denied``."""
    words = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return words[:1].lower() + words[1:]


def integer(text: str, base: int = 10) -> int | None:
    """A number of the kernel, which has at most 64 bits; None where the text is something else."""
    try:
        value = int(text, base)
    except ValueError:
        return None
    return value if abs(value) < 1 << 64 else None


def mib(count: int | None, unit: int = 1) -> float | None:
    """Units of so many bytes in MiB; None stays None."""
    return None if count is None else count * unit / (1 << 20)


def _short(text: str) -> str:
    line = re.sub(r"[^\x20-\x7e]+", " ", text)
    return line if len(line) <= _NOTE_LIMIT else line[: _NOTE_LIMIT - 1] + "…"


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in _DIGITS.split(name)]
