"""Signals set the event and give way to what was there before; what does not end is left behind."""

from __future__ import annotations

import os
import signal
import threading
from typing import TYPE_CHECKING, Any, cast
from unittest.mock import MagicMock

import pytest

from ghsync_dagster import stopping
from ghsync_dagster.cdc.stream import write
from ghsync_dagster.cdc.stream.batch import Batch
from ghsync_dagster.cdc.stream.group import GroupFence
from ghsync_dagster.cdc.stream.listener import SilentListener
from ghsync_dagster.domain.errors import UnavailableError
from ghsync_dagster.stopping import SIGNALS, stop_on_signals, uninterrupted

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def heeded() -> Iterator[None]:
    """Heed every signal, also where nohup started the tests."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in before.items():
        if handler is signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_sets_the_event_and_the_handlers_come_back(number: signal.Signals) -> None:
    before = [signal.getsignal(each) for each in SIGNALS]
    stop = threading.Event()
    with stop_on_signals(stop) as came:
        assert came == []
        signal.raise_signal(number)
        assert stop.wait(10)
        signal.raise_signal(number)
        assert came == [number, number]
    assert [signal.getsignal(each) for each in SIGNALS] == before


@pytest.mark.timeout(20)
def test_a_signal_that_comes_while_the_event_is_locked_holds_nothing_up() -> None:
    stop = threading.Event()
    with stop_on_signals(stop):
        with stop._cond:  # type: ignore[attr-defined]
            signal.raise_signal(signal.SIGTERM)
        assert stop.wait(10)


def test_a_second_signal_may_end_as_ever() -> None:
    stop = threading.Event()
    with stop_on_signals(stop, second_ends=True) as came:
        signal.raise_signal(signal.SIGINT)
        assert stop.wait(10)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert came == [signal.SIGINT]


def test_in_another_thread_nothing_is_changed() -> None:
    before = [signal.getsignal(each) for each in SIGNALS]
    seen: list[object] = []

    def enter() -> None:
        with stop_on_signals(threading.Event()):
            seen.extend(signal.getsignal(each) for each in SIGNALS)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join(10)
    assert seen == before


def test_a_closed_terminal_that_is_ignored_stays_so() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_on_signals(threading.Event()) as came:
            signal.raise_signal(signal.SIGHUP)
        assert came == []
    finally:
        signal.signal(signal.SIGHUP, before)


def test_what_is_not_to_be_interrupted_is_done_before_the_signal_acts() -> None:
    done: list[str] = []

    def work() -> None:
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            done.append("work")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == ["work"]


class HangingLetters:
    """Dead letters whose topic is read without end."""

    def __init__(self) -> None:
        self.begun, self.goes_on = threading.Event(), threading.Event()
        self.is_closed = False

    def begin(self) -> None:
        """Read as long as the test wants."""
        self.begun.set()
        self.goes_on.wait(60)

    def close(self) -> None:
        """Note it."""
        self.is_closed = True


@pytest.mark.parametrize("at_work", [False, True])
def test_a_writer_that_does_not_end_is_left_behind_and_its_work_is_no_success(
    monkeypatch: pytest.MonkeyPatch, *, at_work: bool
) -> None:
    monkeypatch.setattr(write, "_END_SECONDS", 0.05)
    monkeypatch.setattr(stopping, "_abandoned", [])
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    letters = HangingLetters()
    writer = write.Writer(MagicMock(), cast("Any", letters), SilentListener(), GroupFence(0), name="g/t")
    try:
        assert letters.begun.wait(10)
        if at_work:
            writer.submit(Batch())
        writer.close()
        assert (isinstance(writer.failure, UnavailableError), letters.is_closed) == (at_work, False)
        stopping.exit_if_abandoned(143)
        assert codes == [143]
    finally:
        letters.goes_on.set()
        writer._thread.join(10)


def test_a_writer_that_ends_is_closed_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "_abandoned", [])
    letters = HangingLetters()
    letters.goes_on.set()
    writer = write.Writer(MagicMock(), cast("Any", letters), SilentListener(), GroupFence(0), name="g/t")
    writer.close()
    assert (stopping._abandoned, letters.is_closed, writer.failure) == ([], True, None)
