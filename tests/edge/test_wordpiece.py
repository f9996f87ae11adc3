"""The tokeniser against the `tokenizers` library, text by text."""

from __future__ import annotations

import json
import subprocess
import sys
import unicodedata
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetune.edge.pack.wordpiece import WordPiece
from fleetune.edge.protocol.errors import PackError
from fleetune.tools.assets import fetch
from fleetune.tools.assets.datasets import read_rotten_tomatoes

tokenizers = pytest.importorskip("tokenizers", reason="needs tokenizers: pip install 'fleetune[pack]'")

MAX_LENGTH = 48
EARLY = unicodedata.ucd_3_2_0
# Characters that every library knows alike; the tables of later ones differ from library to library.
KNOWN = [c for c in map(chr, range(0x10000)) if EARLY.category(c) == unicodedata.category(c) not in ("Cn", "Cs")]


class Both:
    """Our tokeniser and the library's over the same vocabulary."""

    def __init__(self, vocabulary: Path, *, lowercase: bool) -> None:
        self.ours = WordPiece(vocabulary, lowercase=lowercase, max_length=MAX_LENGTH)
        ids = {token: i for i, token in enumerate(vocabulary.read_text(encoding="utf-8").split("\n")) if token}
        self.theirs = tokenizers.BertWordPieceTokenizer(ids, lowercase=lowercase)
        self.theirs.enable_truncation(MAX_LENGTH)

    def differences(self, texts: Sequence[str]) -> list[str]:
        wanted = [encoding.ids for encoding in self.theirs.encode_batch(list(texts))]
        return [text for text, ids in zip(texts, wanted, strict=True) if self.ours.encode(text) != ids]


@pytest.fixture(scope="module")
def both(minilm: Path) -> Both:
    return Both(minilm / "vocab.txt", lowercase=True)


@pytest.fixture(scope="module")
def cased(minilm: Path) -> Both:
    return Both(minilm / "vocab.txt", lowercase=False)


def test_every_review_snippet(both: Both) -> None:
    texts = [snippet.text for snippet in read_rotten_tomatoes(fetch("rotten-tomatoes"))]
    assert len(texts) == 12_808
    assert both.differences(texts) == []


def test_review_snippets_with_their_case(cased: Both) -> None:
    texts = [snippet.text for snippet in read_rotten_tomatoes(fetch("rotten-tomatoes"))][::10]
    assert cased.differences(texts) == []


@pytest.mark.parametrize("text", [
    "",
    " ",
    "don't stop-believin' (2001): 50% off!!",
    "Ünïcödé café naïve ÀÉÎÕÜ ß ẞ",
    "cafe\N{COMBINING ACUTE ACCENT} a\N{COMBINING CEDILLA}\N{COMBINING DIAERESIS}b",
    "\N{COMBINING ACUTE ACCENT}alone",
    "İstanbul ılık KELVIN \N{KELVIN SIGN} ﬁne ﬂow ǅ",
    "中文字符 mixed中文text 日本語テキスト 한국어",
    "𠀀𪜀 astral ideographs",
    "a\x00b\x01c\x1fd\x7fe\x85f\ufffdg\ufeffh",
    "tab\there\nnew\r\nline\vvertical\fform",
    "no\N{NO-BREAK SPACE}break\N{NARROW NO-BREAK SPACE}thin\N{THIN SPACE}wide\N{IDEOGRAPHIC SPACE}space",
    "line\N{LINE SEPARATOR}paragraph\N{PARAGRAPH SEPARATOR}end",
    "zero\N{ZERO WIDTH SPACE}width\N{ZERO WIDTH JOINER}joined\N{SOFT HYPHEN}soft",
    "👩\N{ZERO WIDTH JOINER}🚀 👍🏽 🇩🇪 ❤️ fine 🎉film",
    "$5 + €3 = ¥? ^_^ `code` <tag> ~x~ |pipe| ¿qué? «oui» „ja“ … — –",
    "٣٤٥ १२३ Ⅳ ½ ² ①",
    "unaffable antidisestablishmentarianism xqzwv",
    "x" * 100,
    "x" * 101,
    "a" * 5000 + " fine",
    "[CLS] [SEP] [MASK] [PAD] [UNK] [unused1]",
    "Русский текст ёжик Й עברית عربي",
])  # fmt: skip
def test_strings_that_are_hard_to_tokenise(text: str, both: Both, cased: Both) -> None:
    if not text.startswith("[CLS]"):  # the library finds special tokens in a text; a device's data has none to find
        assert both.differences([text]) == []
        assert cased.differences([text]) == []
    assert both.ours.encode(text)[0] == 101
    assert both.ours.encode(text)[-1] == 102


def test_a_capital_sigma_at_the_end_of_a_word(both: Both) -> None:
    assert both.differences(["ΟΔΟΣ ΣΙΣΥΦΟΣ"]) == []


def test_characters_that_are_not_assigned_yet_are_unknown_words(both: Both) -> None:
    assert both.differences(["fine \U0001fae0", "good \U0001faf8 film", "a\u0378b"]) == []


def test_every_known_character_between_letters(both: Both) -> None:
    assert both.differences([f"a{char}b" for char in KNOWN]) == []


words = st.text(st.sampled_from("abcdefghijklmnopqrstuvwxyzABCXYZäÉçñ0123456789 '-.,!?\t"), max_size=40)


@settings(max_examples=200)
@given(st.lists(words | st.text(st.sampled_from(KNOWN), max_size=20), max_size=4))
def test_random_texts(both: Both, parts: list[str]) -> None:
    assert both.differences([" ".join(parts), "".join(parts)]) == []


# --- batches ------------------------------------------------------------------------------------------------


def test_a_batch_is_padded_to_its_longest_text(both: Both) -> None:
    batch, lengths = both.ours.encode_batch(["fine", "a very good film", ""])
    assert lengths.tolist() == [3, 6, 2]
    assert batch.shape == (3, 6)
    assert batch[0, 3:].tolist() == [0, 0, 0]
    assert batch[1].tolist() == both.ours.encode("a very good film")


def test_a_long_text_is_cut_and_still_ends_with_its_separator(both: Both) -> None:
    ids = both.ours.encode("good " * 100)
    assert len(ids) == MAX_LENGTH
    assert ids[-1] == 102


def test_an_empty_batch_has_no_rows(both: Both) -> None:
    batch, lengths = both.ours.encode_batch([])
    assert batch.shape == (0, 0)
    assert len(lengths) == 0


# --- vocabularies -------------------------------------------------------------------------------------------


def test_lines_may_end_as_on_windows(minilm: Path, both: Both, tmp_path: Path) -> None:
    file = tmp_path / "vocab.txt"
    file.write_bytes((minilm / "vocab.txt").read_bytes().replace(b"\n", b"\r\n"))
    text = "unaffable antidisestablishmentarianism, don't"
    assert WordPiece(file, lowercase=True, max_length=MAX_LENGTH).encode(text) == both.ours.encode(text)


def test_tokens_with_the_same_checksum_are_told_apart(tmp_path: Path) -> None:
    one, other = "plumless", "buckeroo"
    assert zlib.crc32(one.encode()) == zlib.crc32(other.encode())
    file = tmp_path / "vocab.txt"
    file.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", other, one]), encoding="utf-8")
    tokeniser = WordPiece(file, lowercase=True, max_length=8)
    assert tokeniser.encode("plumless buckeroo") == [2, 5, 4, 3]


def test_a_vocabulary_takes_little_memory(minilm: Path) -> None:
    script = """if True:
        import sys
        from pathlib import Path
        import psutil
        from fleetune.edge.pack.wordpiece import WordPiece

        rss = psutil.Process().memory_info().rss
        tokeniser = WordPiece(Path(sys.argv[1]), lowercase=True, max_length=8)
        tokeniser.encode("fine")
        print(psutil.Process().memory_info().rss - rss)
    """
    command = [sys.executable, "-c", script, str(minilm / "vocab.txt")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert int(done.stdout) < 2.75 * 2**20


@pytest.mark.parametrize("missing", ["[UNK]", "[CLS]", "[SEP]", "[PAD]"])
def test_a_vocabulary_without_a_special_token_is_refused(missing: str, tmp_path: Path) -> None:
    tokens = [token for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "a") if token != missing]
    (tmp_path / "vocab.txt").write_text("\n".join(tokens))
    with pytest.raises(PackError, match="vocab.txt lacks .*" + json.dumps(missing)[2:-2]):
        WordPiece(tmp_path / "vocab.txt", lowercase=True, max_length=8)


def test_ids_are_line_numbers_whatever_the_line_ends(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_bytes(b"[PAD]\r\n[UNK]\r\n[CLS]\r\n[SEP]\r\na\r\n##b\r\n")
    found = WordPiece(tmp_path / "vocab.txt", lowercase=True, max_length=8).encode("ab c")
    np.testing.assert_array_equal(found, [2, 4, 5, 1, 3])
