"""Log lines: JSON where no person reads them, and no credential in any of them, however it got there."""

from __future__ import annotations

import io
import json
import logging
import re
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import structlog

from ghsync_dagster.domain.errors import UnavailableError
from ghsync_dagster.logging import bind_run, get_logger, redact
from ghsync_dagster.progress import log_progress
from ghsync_dagster.retry import retrying

if TYPE_CHECKING:
    from collections.abc import Callable

SECRET = "s3cr3t-PLANTED"
URI = f"mongodb://app:{SECRET}@db:27017/new_data?authSource=admin"


class Terminal(io.StringIO):
    """A standard error that is a terminal."""

    def isatty(self) -> bool:
        """Say so."""
        return True


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_line_is_json_where_standard_error_is_no_terminal(logged: Callable[..., io.StringIO]) -> None:
    stream = logged()
    get_logger("load").info("loaded", inserted=3, seconds=1.5, none=None, yes=True)
    (line,) = lines(stream)
    assert line.pop("timestamp").endswith("Z")
    assert line == {
        "event": "loaded",
        "level": "info",
        "logger": "ghsync.load",
        "inserted": 3,
        "seconds": 1.5,
        "none": None,
        "yes": True,
    }


def test_a_line_is_for_people_on_a_terminal(logged: Callable[..., io.StringIO]) -> None:
    stream = logged(Terminal())
    get_logger("load").info("loaded", inserted=3)
    assert "loaded" in stream.getvalue()
    assert not stream.getvalue().startswith("{")


def test_a_line_goes_to_what_is_standard_error_by_then(
    logged: Callable[..., io.StringIO], monkeypatch: pytest.MonkeyPatch
) -> None:
    stream, of_a_progress_bar = logged(), io.StringIO()
    monkeypatch.setattr(sys, "stderr", of_a_progress_bar)
    get_logger("fetch").warning("tried again")
    assert stream.getvalue() == ""
    assert "tried again" in of_a_progress_bar.getvalue()


def test_a_terminal_s_lines_fit_it(logged: Callable[..., io.StringIO]) -> None:
    stream = logged(Terminal())
    bind_run("123e4567-e89b-12d3-a456-426614174000")
    get_logger("load").info("phase done", phase="prepare", load="0123456789abcdef0123456789abcdef", seconds=0.172)
    (line,) = re.sub("\x1b\\[[0-9;]*m", "", stream.getvalue()).splitlines()
    assert re.fullmatch(r"[0-9:]{8} \[info\] phase done \[load\] phase=prepare seconds=0.172", line)


def test_what_takes_long_is_told_now_and_then_and_no_longer(logged: Callable[..., io.StringIO]) -> None:
    class Told(io.StringIO):
        def __init__(self) -> None:
            super().__init__()
            self.twice = threading.Event()

        def write(self, text: str) -> int:
            count = super().write(text)
            if self.getvalue().count("still reading") >= 2:
                self.twice.set()
            return count

    stream = Told()
    logged(stream)
    with log_progress("reading", lambda: {"files": 3}, every=0.01):
        assert stream.twice.wait(10)
    told = lines(stream)
    assert {(line["event"], line["files"], line["seconds"]) for line in told} == {("still reading", 3, 0)}
    assert "progress" not in {thread.name for thread in threading.enumerate()}


@pytest.mark.parametrize(("wanted", "as_json"), [("json", True), ("console", False)])
def test_the_format_can_be_set(logged: Callable[..., io.StringIO], wanted: str, as_json: bool) -> None:
    stream = logged(Terminal() if as_json else None, GHSYNC_LOG_FORMAT=wanted)
    get_logger("load").info("loaded")
    assert stream.getvalue().startswith("{") is as_json


def test_the_level_can_be_set(logged: Callable[..., io.StringIO]) -> None:
    stream = logged(GHSYNC_LOG_LEVEL="WARNING")
    get_logger("load").info("not this")
    get_logger("load").warning("this")
    assert [line["event"] for line in lines(stream)] == ["this"]


def test_setting_up_twice_logs_once(logged: Callable[..., io.StringIO]) -> None:
    logged()
    stream = logged()
    get_logger("twice").info("once")
    assert len(lines(stream)) == 1


def test_what_is_bound_to_the_run_is_in_every_line(logged: Callable[..., io.StringIO]) -> None:
    stream = logged()
    structlog.contextvars.bind_contextvars(run_id="r1")
    get_logger("load").info("one")
    logging.getLogger("ghsync.other").warning("two")
    assert [line["run_id"] for line in lines(stream)] == ["r1", "r1"]


def fail() -> None:
    raise UnavailableError(f"{URI} is away.", way_out=f"Look at {URI}.")


def log_text() -> None:
    get_logger("x").info(f"to {URI}")


def log_value() -> None:
    get_logger("x").info("to", uri=URI)


def log_nested() -> None:
    get_logger("x").info("to", where={"uris": [URI, (URI,)], URI: {URI}, "options": {"connection.uri": URI}})


def log_bound() -> None:
    get_logger("x").bind(uri=URI).info("to")


def log_context() -> None:
    structlog.contextvars.bind_contextvars(uri=URI)
    get_logger("x").info("to")


def log_exception() -> None:
    try:
        fail()
    except UnavailableError:
        get_logger("x").exception("failed")


def log_error_object() -> None:
    try:
        fail()
    except UnavailableError as error:
        get_logger("x").error("failed", error=error, cause=[error])


def log_chained() -> None:
    try:
        try:
            fail()
        except UnavailableError as error:
            raise RuntimeError(f"could not use {URI}") from error
    except RuntimeError:
        get_logger("x").exception("failed")


def log_path() -> None:
    get_logger("x").info("to", path=Path("/data"), text=URI.encode())


def log_standard_library() -> None:
    logging.getLogger("ghsync.std").warning("to %s", URI)


def log_standard_library_exception() -> None:
    try:
        fail()
    except UnavailableError:
        logging.getLogger("ghsync.std").exception("to %s", URI)


WAYS = [
    log_text,
    log_value,
    log_nested,
    log_bound,
    log_context,
    log_exception,
    log_error_object,
    log_chained,
    log_path,
    log_standard_library,
    log_standard_library_exception,
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("form", ["json", "console"])
def test_no_credential_reaches_the_log(logged: Callable[..., io.StringIO], way: Callable[[], None], form: str) -> None:
    stream = logged(GHSYNC_LOG_FORMAT=form)
    way()
    text = stream.getvalue()
    assert text
    assert SECRET not in text
    assert "mongodb://***@db:27017" in text


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("mongodb://app:s3cret@db/x", "mongodb://***@db/x"),
        ("mongodb+srv://app:s3cret@db", "mongodb+srv://***@db"),
        ("mongodb://app@db", "mongodb://***@db"),
        ("mongodb://app:p@ss@db/x@y", "mongodb://***@db/x@y"),
        ("mongodb://app:s3cret@a:1,b:2/x", "mongodb://***@a:1,b:2/x"),
        ("(https://u:p@h/a) and mysql+pymysql://u:p@h", "(https://***@h/a) and mysql+pymysql://***@h"),
        ("mysql://app:p/s:s@db/x and mysql://app:/@db", "mysql://***@db/x and mysql://***@db"),
        ("mongodb://db:27017/x", "mongodb://db:27017/x"),
        ("me@example.org and https://github.com/a@b", "me@example.org and https://github.com/a@b"),
        ("", ""),
    ],
)
def test_exactly_the_credentials_of_a_uri_are_masked(text: str, masked: str) -> None:
    assert redact(text) == masked


@pytest.mark.timeout(10)
def test_a_long_word_is_masked_in_linear_time() -> None:
    word = "://a:" * 20_000
    assert redact(word) == word


def test_a_try_that_fails_is_one_line_of_ours_and_nothing_of_the_library_s(
    logged: Callable[..., io.StringIO], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise UnavailableError("MongoDB can't be reached.", way_out="Start it.")

    monkeypatch.setattr("ghsync_dagster.retry._FIRST_SECONDS", 0.001)
    stream = logged()
    with pytest.raises(UnavailableError):
        retrying("Comparing", fail, attempts=3)
    assert [(line["event"], line["attempt"]) for line in lines(stream)] == [
        ("transient fault; retrying", at) for at in (1, 2, 3)
    ]
    assert caplog.records == []
