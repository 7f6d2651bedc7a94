"""SIGTERM and Ctrl-C set the event, whatever is interrupted, and give way to what was there before."""

from __future__ import annotations

import signal
import threading

import pytest

from ghsync_dagster.stopping import SIGNALS, stop_on_signals, uninterrupted


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
    with stop_on_signals(stop, again_ends=True) as came:
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
