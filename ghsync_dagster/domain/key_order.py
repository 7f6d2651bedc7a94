"""Decimal strings in the order of text: which integers an interval of texts holds, and where to cut that order.

MongoDB orders ``user_id`` as text ("10" before "9"), MySQL as a number. All texts of one sign and one number of digits
have the same order in both, so an interval of texts is one range of integers for each of these.

Belongs here: the arithmetic of that order. Not here: who reads which side.
"""

from __future__ import annotations

import re
from typing import Final

_DIGITS: Final = re.compile("[0-9]*")
_WIDTH: Final = 20
"""So many digits tell cuts apart: as many as the largest 64-bit integer has."""
_NINE_TENTHS: Final = 9 * 10 ** (_WIDTH - 1)
_EDGES: Final = ("-", "-1", ".", "0", "1", ":")
"""Cuts between kinds of text: no sign or digit, "-" and "-0…", below zero, between, "0…", from 1 on, the rest."""
_DENSE: Final = {".": "-", ":": ""}
"""The kinds that hold canonical integers, by their upper edge, with the sign of these."""
_MOST_GROWTH: Final = 4


def integer_ranges(after: str | None, upto: str | None, least: int, most: int) -> list[tuple[int, int]]:
    """Return the integers whose decimal text is above ``after`` and at most ``upto``, as ranges with both ends.

    Args:
        after: Any text; None: from the first one on.
        upto: Any text; None: to the last one.
        least: No integer below it counts.
        most: No integer above it counts.

    >>> integer_ranges("1", "12", 0, 999)
    [(10, 12), (100, 119)]
    """
    found: list[tuple[int, int]] = []
    for sign, largest in (("-", -least), ("", most)):
        for digits in range(1, len(str(max(largest, 0))) + 1):
            first = 10 ** (digits - 1) if digits > 1 or sign else 0
            last = min(10**digits - 1, largest)
            low = first if after is None else _last_upto(after, sign, first, last) + 1
            high = last if upto is None else _last_upto(upto, sign, first, last)
            if low <= high:
                low, high = (-high, -low) if sign else (low, high)
                if max(low, least) <= min(high, most):
                    found.append((max(low, least), min(high, most)))
    found.sort()
    joined: list[tuple[int, int]] = []
    for low, high in found:
        begins = joined.pop()[0] if joined and joined[-1][1] + 1 == low else low
        joined.append((begins, high))
    return joined


def _last_upto(bound: str, sign: str, first: int, last: int) -> int:
    """Return the largest magnitude between ``first`` and ``last``, of as many digits, whose text is at most ``bound``.

    ``first - 1`` where there is none.
    """
    if not bound.startswith(sign):
        return last if sign < bound else first - 1
    rest, digits = bound[len(sign) :], len(str(first))
    prefix = _prefix(rest)[:digits]
    scale = 10 ** (digits - len(prefix))
    number = int(prefix or "0")
    if len(prefix) == digits:
        found = number
    elif rest[len(prefix) :] > "9":
        # A character above the digits: all that begin with these digits are below.
        found = (number + 1) * scale - 1
    else:
        found = number * scale - 1
    return max(first - 1, min(last, found))


def _prefix(text: str) -> str:
    found = _DIGITS.match(text)
    return found[0] if found else ""


class Stride:
    """Cuts the order of texts into intervals that hold about as many keys each, learning from those before.

    A cut may be anywhere: an interval that turns out too full or empty costs time and nothing else.

    Args:
        keys: About how many there are in all.
        target: How many an interval is to hold.
    """

    def __init__(self, keys: int, target: int) -> None:
        self._target = target
        self._step = max(1, _NINE_TENTHS * target // max(keys, target))

    def bound(self, after: str | None) -> str | None:
        """Return the end of the interval that begins after a text; None: the end of all."""
        edge = next((edge for edge in _EDGES if after is None or edge > after), None)
        if after is None or edge is None or edge not in _DENSE:
            return edge
        sign = _DENSE[edge]
        step = self._step
        while (number := _padded(after, sign) + step) < 10**_WIDTH:
            if (cut := f"{sign}{number:0{_WIDTH}}") > after:
                return cut
            step *= 2
        return edge

    def learn(self, after: str | None, upto: str | None, found: int) -> None:
        """Adjust the stride to how many keys an interval held, so that the next one holds about the target."""
        if after is None or upto is None:
            return
        edge = next((edge for edge in _EDGES if edge > after), "")
        if edge in _DENSE:
            sign = _DENSE[edge]
            end = 10**_WIDTH if upto == edge else _padded(upto, sign)
            covered = max(1, end - _padded(after, sign))
            wanted = covered * self._target // max(found, 1)
            self._step = max(1, min(wanted, covered * _MOST_GROWTH))


def _padded(text: str, sign: str) -> int:
    return int(_prefix(text[len(sign) :])[:_WIDTH].ljust(_WIDTH, "0"))
