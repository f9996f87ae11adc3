"""What others wrote is shown as one line, whatever is in it."""

from __future__ import annotations

import io
import logging

import pytest

from fleetune.tools.text import LineFormatter, columns, visible


@pytest.mark.parametrize(("text", "shown"), [
    ("plain, with ä, 中 and …", "plain, with ä, 中 and …"),
    ("two\nlines\r\n", r"two\nlines\r\n"),
    ("\x1b[2J\x07", r"\x1b[2J\x07"),
    ("right\u202eleft", r"right\u202eleft"),
    ("half\ud800", r"half\ud800"),
    ("\u2028", r"\u2028"),
])  # fmt: skip
def test_what_cannot_be_printed_is_escaped(text: str, shown: str) -> None:
    assert visible(text) == shown


def test_no_message_makes_a_second_line_in_a_log() -> None:
    out = io.StringIO()
    handler = logging.StreamHandler(out)
    handler.setFormatter(LineFormatter("%(levelname)s %(message)s"))
    log = logging.Logger("test")
    log.addHandler(handler)
    log.warning("%s: refused", "nano-1\nINFO nano-1: accepted")
    try:
        int("bad\x1b[1A")
    except ValueError:
        log.exception("unforeseen")
    lines = out.getvalue().splitlines()
    assert lines[0] == r"WARNING nano-1\nINFO nano-1: accepted: refused"
    assert lines[1] == "ERROR unforeseen"
    assert lines[2].startswith("Traceback")
    assert lines[-1] == r"ValueError: invalid literal for int() with base 10: 'bad\x1b[1A'"


def test_no_cell_of_a_table_moves_a_cursor() -> None:
    shown = r"a\r\x1b[2Jb"
    assert columns([["name", "n"], ["a\r\x1b[2Jb", "7"]]) == f"{'name':{len(shown)}}  n\n{shown}  7"
