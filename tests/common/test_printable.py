"""Texts of others reach a terminal as text: no markup, no control characters, no turned direction."""

import io

import pytest
from rich.console import Console

from mllm_jax.common.cli import cell, fail
from mllm_jax.common.printable import printable, printable_lines
from mllm_jax.data.records.records import BadRecord, read_record
from mllm_jax.generate.chat import write_answer

HOSTILE = "\x1b]0;title\x07[bold red]a\x9b2J\u202egnp.a\ud800\r\n"
SHOWN = r"\x1b]0;title\x07[bold red]a\x9b2J\u202egnp.a\ud800\r\n"


def test_what_is_no_visible_character_is_an_escape():
    assert printable(HOSTILE) == SHOWN and printable(SHOWN) == SHOWN
    assert printable_lines("a\x1b\n\tb\r\n") == "a\\x1b\n\tb\\r\n"
    for text in ("", "plain", "Ünïcode 漢字 \N{FAMILY}\N{ZERO WIDTH JOINER}\N{GIRL}", "a\N{NO-BREAK SPACE}b"):
        assert printable(text) == text == printable_lines(text)


def test_names_and_kinds_of_records_and_their_errors_are_printable():
    record = {"id": HOSTILE, "task": HOSTILE, "text": "A cat."}
    read = read_record(record, "name", lambda name: name)
    assert (read["id"], read["kind"]) == (SHOWN, SHOWN)
    error = BadRecord("missing file", HOSTILE, HOSTILE)
    assert str(error) == f"{SHOWN}: missing file ({SHOWN})"


def test_a_cell_of_a_table_is_no_markup():
    console = Console(file=io.StringIO(), force_terminal=True, width=200)
    console.print(cell(HOSTILE))
    assert console.file.getvalue() == SHOWN + "\n"


def test_errors_of_commands_are_printable(capsys):
    with pytest.raises(SystemExit):
        fail(f"there is no {HOSTILE}", 1)
    assert capsys.readouterr().err == "error: there is no " + SHOWN.removesuffix(r"\n") + "\n\n"


def test_answers_are_escaped_on_a_terminal_alone(capsys, monkeypatch):
    write_answer("a\x1b[2J\n")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    write_answer("a\x1b[2J\n")
    assert capsys.readouterr().out == "a\x1b[2J\na\\x1b[2J\n"


def test_an_inspection_shows_hostile_names_as_text(tmp_path, capsys):
    from mllm_jax.train.inspection import _left_out, _table

    kinds = _table("kind", "conversations")
    kinds.add_row(cell(HOSTILE), "1")
    console = Console(file=io.StringIO(), force_terminal=True, width=300)
    console.print(kinds, _left_out({"missing file": 1}, {"missing file": [str(BadRecord("missing file", HOSTILE))]}))
    said = console.file.getvalue()
    assert said.count(SHOWN) == 2 and "\x07" not in said and "\u202e" not in said
