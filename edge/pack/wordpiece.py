"""BERT's tokeniser: normalise, split, then greedy longest-match WordPiece (Devlin et al. 2018).

The `tokenizers` library computes the same, but installs a hub client and its dependencies with it, which do not
belong on a device; ``tests/edge/test_wordpiece.py`` holds this one against it, text by text.
"""

from __future__ import annotations

import unicodedata
import zlib
from array import array
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fleetune.edge.protocol.errors import PackError
from fleetune.edge.protocol.files import read_bytes

_MAX_WORD = 100
_LETTERS = 4096
"""So many are looked up once: a text has few that differ."""

MAX_VOCABULARY = 4 << 20
"""Largest vocabulary in bytes."""

_CJK = (
    (0x4E00, 0x9FFF),
    (0x3400, 0x4DBF),
    (0x20000, 0x2A6DF),
    (0x2A700, 0x2B73F),
    (0x2B740, 0x2B81F),
    (0x2B820, 0x2CEAF),
    (0xF900, 0xFAFF),
    (0x2F800, 0x2FA1F),
)


class _Vocabulary:
    """Finds a token's id: its line in the file.

    The file's bytes and a sorted table of checksums take 0.6 MiB for 30,000 tokens. A dictionary takes 4 MiB, of which
    Python may keep 3 when it is gone: too much for a device that reads texts once and then waits for a day.
    """

    def __init__(self, lines: bytes) -> None:
        self._bytes = lines.replace(b"\r\n", b"\n") + b"\n"
        ends = np.flatnonzero(np.frombuffer(self._bytes, dtype=np.uint8) == ord("\n")) + 1
        starts = np.concatenate([[0], ends])
        tokens = (self._bytes[start : end - 1] for start, end in zip(starts, ends, strict=False))
        sums = np.fromiter(map(zlib.crc32, tokens), np.uint32, len(ends))
        order = np.argsort(sums)
        self._sums, self._order, self._starts = (_array(numbers) for numbers in (sums[order], order, starts))

    def find(self, token: str) -> int | None:
        """Id of a token; None if the file lacks it."""
        wanted = token.encode()
        checksum = zlib.crc32(wanted)
        at = bisect_left(self._sums, checksum)
        while at < len(self._sums) and self._sums[at] == checksum:  # several tokens may share one
            line = self._order[at]
            if self._bytes[self._starts[line] : self._starts[line + 1] - 1] == wanted:
                return line
            at += 1
        return None


def _array(numbers: NDArray[Any]) -> array[int]:
    """Numbers of 32 bits, which an array hands out faster than NumPy does."""
    return array("I", numbers.astype(np.uint32).tobytes())


class WordPiece:
    """Text → token ids.

    Args:
        vocabulary: File with one token a line; the line number is the id.
        lowercase: Whether to fold case and strip accents.
        max_length: Longest sequence, the two special tokens included; longer texts are cut.

    Raises:
        PackError: The file cannot be read, is larger than any vocabulary, or lacks a special token.
    """

    def __init__(self, vocabulary: Path, *, lowercase: bool, max_length: int) -> None:
        try:
            self._vocabulary = _Vocabulary(read_bytes(vocabulary, MAX_VOCABULARY))
        except OSError as error:
            raise PackError(f"{vocabulary} cannot be read: {error.strerror}", "write the pack again") from error
        self._lowercase = lowercase
        self._max_length = max_length
        special = {token: self._vocabulary.find(token) for token in ("[UNK]", "[CLS]", "[SEP]", "[PAD]")}
        missing = [token for token, found in special.items() if found is None]
        if missing:
            raise PackError(f"{vocabulary} lacks {', '.join(missing)}", "write the pack again")
        self._unknown, self._begin, self._end, self._pad = (found for found in special.values() if found is not None)

    def encode(self, text: str) -> list[int]:
        """Token ids of one text, with the special tokens at both ends."""
        ids = (piece for word in self._words(text) for piece in self._pieces(word))
        return [self._begin, *islice(ids, self._max_length - 2), self._end]

    def encode_batch(self, texts: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Encode and pad to the longest text.

        Returns:
            Token ids [n, t] and lengths [n].
        """
        encoded = [self.encode(text) for text in texts]
        lengths = np.array([len(ids) for ids in encoded], dtype=np.int64)
        batch = np.full((len(texts), int(lengths.max(initial=0))), self._pad, dtype=np.int64)
        for row, ids in zip(batch, encoded, strict=True):
            row[: len(ids)] = ids
        return batch, lengths

    def _words(self, text: str) -> Iterator[str]:
        cleaned = "".join(map(_clean, text))
        if self._lowercase:
            decomposed = unicodedata.normalize("NFD", cleaned)
            # Letter by letter: str.lower() would turn a sigma at the end of a word into its final form.
            cleaned = "".join(c.lower() for c in decomposed if unicodedata.category(c) != "Mn")
        for word in cleaned.split():
            start = 0
            for i, char in enumerate(word):
                if _is_punctuation(char):
                    if start < i:
                        yield word[start:i]
                    yield char
                    start = i + 1
            if start < len(word):
                yield word[start:]

    def _pieces(self, word: str) -> list[int]:
        if len(word) > _MAX_WORD:
            return [self._unknown]
        pieces, start = [], 0
        while start < len(word):
            prefix = "##" if start else ""
            for end in range(len(word), start, -1):
                found = self._vocabulary.find(prefix + word[start:end])
                if found is not None:
                    pieces.append(found)
                    start = end
                    break
            else:
                return [self._unknown]
        return pieces


@lru_cache(_LETTERS)
def _clean(char: str) -> str:
    code = ord(char)
    if char in "\t\n\r":
        return " "
    category = unicodedata.category(char)
    if code in (0, 0xFFFD) or category in ("Cc", "Cf", "Co", "Cs"):
        return ""
    if category == "Zs":
        return " "
    return f" {char} " if any(low <= code <= high for low, high in _CJK) else char


@lru_cache(_LETTERS)
def _is_punctuation(char: str) -> bool:
    code = ord(char)
    ascii_symbol = 33 <= code <= 47 or 58 <= code <= 64 or 91 <= code <= 96 or 123 <= code <= 126
    return ascii_symbol or unicodedata.category(char).startswith("P")
