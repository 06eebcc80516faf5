import sys

import pytest

from implicit_bench import terminal
from implicit_bench.terminal import Bar, duration, number, say, share


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (float("nan"), "–"), (0, "0.00"), (5.3, "5.30"), (123.4, "123"), (0.0073, "0.00730"),
     (7.3e-4, "7e-4"),     (2.5e6, "2e6"), (1500, "1500"), (12345.6, "12346")],
)  # fmt: skip
def test_numbers(value, text):
    assert number(value) == text


def test_shares_and_durations():
    assert share(0.97777) == "0.978"
    assert share(None) == "–"
    assert [duration(s) for s in (4.23, 42, 600, 36_000)] == ["4.2 s", "42 s", "10 min", "10.0 h"]


def test_say_indents_further_lines_and_writes_no_escape_codes_to_a_pipe(capsys):
    say("train", "one\ntwo")
    assert capsys.readouterr().out == "train   one\n        two\n"
    say("note", "aside", err=True)
    assert capsys.readouterr().err == "note    aside\n"


def test_no_color(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    say("train", "x")
    assert capsys.readouterr().out == "\033[1mtrain\033[0m   x\n"
    monkeypatch.setenv("NO_COLOR", "1")
    say("train", "x")
    assert capsys.readouterr().out == "train   x\n"


def test_without_a_terminal_a_bar_is_plain_lines(capsys):
    bar = Bar(10, "steps")
    bar.at(5, lambda: pytest.fail("nothing is drawn, so nothing is asked for"))
    bar.line("  1   0.5")
    bar.close()
    assert capsys.readouterr().err == "  1   0.5\n"


def test_a_bar_is_redrawn_five_times_a_second_at_most(monkeypatch):
    class Terminal:
        def isatty(self):
            return True

        def write(self, text):
            return len(text)

        def flush(self): ...

    now = [0.0]
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(terminal.time, "perf_counter", lambda: now[0])
    bar = Bar(1000, "steps")
    drawn = []
    for k in range(100):
        now[0] = 1 + k / 100
        bar.at(k, lambda k=k: drawn.append(k) or "")
    bar.close()
    assert len(drawn) == 5
