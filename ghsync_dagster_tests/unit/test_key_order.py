"""Every decimal text falls in exactly the ranges of its interval, and cuts go through all texts once."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from ghsync_dagster.domain.key_order import Stride, integer_ranges

LEAST, MOST = -(2**63), 2**64 - 1
integers = st.one_of(st.integers(-1_200, 1_200), st.integers(LEAST, MOST))
texts = st.one_of(
    integers.map(str),
    st.text(alphabet="-0123456789/:a\0\u00e9\u0661", max_size=6),
    st.from_regex(r"\A-?[0-9]{1,25}[x.]?\Z"),
)


def within(number: int, ranges: list[tuple[int, int]]) -> bool:
    """Whether a range holds the number."""
    return any(low <= number <= high for low, high in ranges)


@given(bounds=st.tuples(st.none() | texts, st.none() | texts), number=integers)
def test_an_integer_is_in_the_ranges_exactly_where_its_text_is_in_the_interval(
    bounds: tuple[str | None, str | None], number: int
) -> None:
    after, upto = bounds
    text = str(number)
    expected = (after is None or text > after) and (upto is None or text <= upto)
    assert within(number, integer_ranges(after, upto, LEAST, MOST)) == expected


@given(bound=texts, steps=st.integers(-2, 2), number=integers)
def test_the_integers_next_to_a_bound_are_on_their_side(bound: str, steps: int, number: int) -> None:
    near = (int(bound) if bound.lstrip("-").isascii() and bound.lstrip("-").isdigit() else number) + steps
    near = max(LEAST, min(MOST, near))
    assert within(near, integer_ranges(None, bound, LEAST, MOST)) == (str(near) <= bound)


@given(cuts=st.lists(texts, max_size=6, unique=True).map(sorted))
def test_cuts_share_all_integers_out(cuts: list[str]) -> None:
    bounds = [None, *cuts, None]
    ranges = sorted(found for one, two in pairwise(bounds) for found in integer_ranges(one, two, LEAST, MOST))
    assert ranges[0][0] == LEAST
    assert ranges[-1][1] == MOST
    assert all(before[1] + 1 == after[0] for before, after in pairwise(ranges))


@given(least=integers, most=integers)
def test_only_what_a_column_can_hold_is_asked_for(least: int, most: int) -> None:
    assert integer_ranges(None, None, least, most) == ([(least, most)] if least <= most else [])


@given(keys=st.lists(texts, max_size=60, unique=True).map(sorted), estimate=st.integers(0, 10**7))
def test_a_stride_meets_every_text_once(keys: list[str], estimate: int) -> None:
    limit = 5
    stride, after, met = Stride(estimate, 3), None, []
    for _ in range(5_000):
        upto = stride.bound(after)
        assert upto is None or after is None or upto > after
        found = [key for key in keys if (after is None or key > after) and (upto is None or key <= upto)]
        if len(found) > limit:
            found = found[:limit]
            upto = found[-1]
        met += found
        stride.learn(after, upto, len(found))
        if upto is None:
            break
        after = upto
    else:
        raise AssertionError("it does not end")
    assert met == keys


def test_a_stride_settles_near_its_target() -> None:
    keys = sorted(str(number) for number in range(1, 300_000, 3))
    stride, after, sizes, at = Stride(len(keys), 700), None, [], 0
    while True:
        upto = stride.bound(after)
        end = at
        while end < len(keys) and end < at + 1_000 and (upto is None or keys[end] <= upto):
            end += 1
        if end == at + 1_000:
            upto = keys[end - 1]
        sizes.append(end - at)
        stride.learn(after, upto, end - at)
        at = end
        if upto is None:
            break
        after = upto
    assert at == len(keys)
    assert len(sizes) < 2 * len(keys) / 700
