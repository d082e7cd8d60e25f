"""Reporters: what they say, how often, and which one a stream gets."""

from __future__ import annotations

import io
import re

from pairmill.report.progress import LiveReporter, LogReporter, reporter_for


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_what_is_counted_is_named():
    stream, clock = io.StringIO(), Clock()
    reporter = LogReporter(stream, clock)
    reporter.start("verify", 3, "files")
    clock.now += 20
    reporter.advance(2, {})
    reporter.finish()
    assert stream.getvalue().splitlines() == [
        "verify: 3 files to do",
        "verify: 2 of 3 (67%), 0.1 files/s, 10.0 s left",
        "verify: 2 files in 20.0 s",
    ]


def test_a_log_says_what_begins_how_it_goes_and_what_came_out():
    stream, clock = io.StringIO(), Clock()
    reporter = LogReporter(stream, clock)
    reporter.start("clip", 1000)
    for _ in range(10):
        clock.now += 2
        reporter.advance(100, {"clip.below_threshold": 7, "http.timeout": 1})
    reporter.finish()
    lines = stream.getvalue().splitlines()
    assert lines[0] == "clip: 1,000 rows to do"
    assert lines[1] == (
        "clip: 100 of 1,000 (10%), 50.0 rows/s, 18.0 s left, out: clip.below_threshold 7, http.timeout 1"
    )
    assert lines[-1] == "clip: 1,000 rows in 20.0 s, out: clip.below_threshold 70, http.timeout 10"
    assert len(lines) == 1 + 10 + 1


def test_a_log_is_quiet_between_tenths_and_speaks_after_ten_seconds():
    stream, clock = io.StringIO(), Clock()
    reporter = LogReporter(stream, clock)
    reporter.start("download", 1_000_000)
    for _ in range(60):
        clock.now += 1
        reporter.advance(10, {})
    assert len(stream.getvalue().splitlines()) == 1 + 6


def test_a_fast_segment_does_not_flood_the_log():
    stream, clock = io.StringIO(), Clock()
    reporter = LogReporter(stream, clock)
    reporter.start("words", 1000)
    for _ in range(1000):
        clock.now += 0.001
        reporter.advance(1, {})
    reporter.finish()
    assert len(stream.getvalue().splitlines()) <= 3


def test_an_empty_segment_can_be_told():
    stream = io.StringIO()
    reporter = LogReporter(stream, Clock())
    reporter.start("nothing", 0)
    reporter.advance(0, {})
    reporter.finish()
    reporter.finish()
    assert stream.getvalue().splitlines() == ["nothing: 0 rows to do", "nothing: 0 rows in 0.0 s"]


def test_notes_are_one_line_without_secrets_or_escapes():
    for make in (LogReporter, LiveReporter):
        stream = io.StringIO()
        make(stream).note("reading https://u:pw@host/x?sig=1 \x1b[31m[red]\nnext")
        (line,) = stream.getvalue().splitlines()
        assert line == r"reading https://host/x?... \x1b[31m[red]\nnext"


def test_a_terminal_gets_a_line_that_moves_and_stays(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    stream = Terminal()
    with reporter_for(stream, {"TERM": "xterm"}) as reporter:
        assert isinstance(reporter, LiveReporter)
        reporter.start("clip[x]", 200)
        reporter.advance(150, {"clip.below_threshold": 30})
        reporter.advance(50, {"http.timeout": 2})
        reporter.finish()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    last = text.rstrip().split("\r")[-1]
    assert "clip[x]" in last
    assert "200/200" in last
    assert "rows/s" in text
    assert "out: clip.bel" in text


def test_a_cut_off_segment_is_ended_by_the_context():
    stream = Terminal()
    try:
        with reporter_for(stream, {"TERM": "xterm"}) as reporter:
            reporter.start("clip", 200)
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert stream.getvalue().endswith("\x1b[?25h")  # the cursor is visible again


def test_pipes_and_dumb_terminals_get_plain_lines():
    for stream, term in ((io.StringIO(), "xterm"), (Terminal(), "dumb"), (Terminal(), "")):
        with reporter_for(stream, {"TERM": term}) as reporter:
            reporter.start("clip", 1)
            reporter.advance(1, {})
        assert isinstance(reporter, LogReporter)
        assert "\x1b" not in stream.getvalue()


def test_no_color_is_respected(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    stream = Terminal()
    with reporter_for(stream, {"TERM": "xterm"}) as reporter:
        reporter.start("clip", 2)
        reporter.advance(1, {})
    assert not re.search(r"\x1b\[(?:\d+;)*(?:3[0-7]|38;[\d;]+)m", stream.getvalue())
