"""Bytes of files: however they come in blocks, nothing is lost, doubled or joined, and what is not whole is told."""

from __future__ import annotations

import bz2
import gzip
import io
import json
from contextlib import suppress
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ghsync_dagster.batch import unpack
from ghsync_dagster.batch.unpack import (
    DamagedError,
    TooLongError,
    events_within,
    lines_of,
    packing_of,
    range_of_lines,
    unpacked,
    values_of,
    weight_of,
)
from ghsync_dagster.domain.event import Event, event_decoder
from ghsync_dagster_tests.support.odd_lines import EVENT

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

# Times depend on what else the machine does.
patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
texts = st.lists(st.binary(max_size=30).filter(lambda line: b"\n" not in line), max_size=40).map(b"\n".join)


def in_blocks(content: bytes, size: int) -> list[bytes]:
    return [content[at : at + size] for at in range(0, len(content), size)]


@patient
@given(texts, st.integers(1, 50))
def test_lines_are_those_of_the_whole_text(text: bytes, size: int) -> None:
    lines = text.split(b"\n")
    found = [line for some in lines_of(in_blocks(text, size)) for line in some]
    assert found == (lines[:-1] if lines[-1] == b"" else lines)


@patient
@given(texts, st.integers(1, 60), st.integers(1, 8))
def test_ranges_side_by_side_give_each_line_to_the_one_it_begins_in(text: bytes, size: int, block: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unpack, "BLOCK", block)
        patch.setattr(unpack, "_PACKED_BLOCK", block)
        begins = [0, *(at + 1 for at, byte in enumerate(text) if byte == 10)]
        for start in range(0, len(text), size):
            end = min(start + size, len(text))
            found = b"".join(range_of_lines(io.BytesIO(text), start, end))
            mine = [begin for begin in begins if start <= begin < end]
            after = [begin for begin in begins if begin >= end]
            assert found == (text[mine[0] : after[0] if after else len(text)] if mine else b"")


values = st.recursive(
    st.none() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
objects = st.lists(st.dictionaries(st.text(), values, max_size=3), min_size=1, max_size=6)


@patient
@given(objects, st.sampled_from([None, 0, 2]), st.booleans(), st.booleans(), st.integers(1, 40))
def test_values_are_the_objects_of_an_array_or_of_a_row(
    wanted: list[Any], indent: int | None, is_array: bool, ascii_only: bool, size: int
) -> None:
    if is_array:
        text = json.dumps(wanted, indent=indent, ensure_ascii=ascii_only)
    else:
        text = "\n".join(json.dumps(value, indent=indent, ensure_ascii=ascii_only) for value in wanted)
    content = text.encode("utf-8", "surrogatepass")
    found = list(values_of(in_blocks(content, size)))
    assert [json.loads(value) for _, value in found] == wanted
    lines = content.split(b"\n")
    for line, value in found:
        assert value.split(b"\n")[0] in lines[line - 1]


@patient
@given(st.lists(values, max_size=6), st.sampled_from([None, 0, 2]), st.booleans(), st.integers(1, 40))
def test_values_that_are_no_objects_are_values_too(
    wanted: list[Any], indent: int | None, in_arrays: bool, size: int
) -> None:
    text = "".join(json.dumps([value], indent=indent) for value in wanted) if in_arrays else json.dumps(wanted)
    found = list(values_of(in_blocks(text.encode(), size)))
    assert [json.loads(value) for _, value in found] == wanted
    assert sum(map(weight_of, (value for _, value in found))) == weight_of(text.encode())


E1, E2 = b'{"a":1}', b'{"b":[2]}'


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (b'[{"a":1},null,{"b":[2]}]', [E1, b"null", E2]),
        (b'[{"a":1},5.0,-1e3 ,"x,]{",{"b":[2]},true]', [E1, b"5.0", b"-1e3", b'"x,]{"', E2, b"true"]),
        (b'[{"a":1}]\n[{"b":[2]}]', [E1, E2]),
        (b'[{"a":1}][{"b":[2]}]', [E1, E2]),
        (b'[{"a":1},[{"c":3},"]"],{"b":[2]}]', [E1, b'[{"c":3},"]"]', E2]),
        (b'[{"a":1},,{"b":[2]},]', [E1, E2]),
        (b'[{"a":1}]{"b":[2]}', [E1, E2]),
        (b'[{"a":1}]]{"b":[2]}', [E1, b"]", E2]),
        (b'{"a":1}}{"b":[2]}', [E1, b"}", E2]),
        (b'{"a":1} x y: {"b":[2]}', [E1, b"x", b"y:", E2]),
        (b'[{"a":1},{"b":[2]}]' + bytes(50), [E1, E2, bytes(50)]),
        (b'[{"a":1},{"b":[2]}]\n' + bytes(50) + b"\n", [E1, E2, bytes(50)]),
        (b'{"a":1}' + bytes(3) + b'x{"b":[2]}5', [E1, bytes(3), b"x", E2, b"5"]),
    ],
)
def test_a_bad_value_stops_no_good_one(content: bytes, wanted: list[bytes]) -> None:
    for size in (1, 3, 100):
        found = [value for _, value in values_of(in_blocks(content, size))]
        assert found == wanted


@pytest.mark.parametrize(
    "content", [b'[{"a":1}', b'[{"a":1},', b'[{"a":"x', b"[", b'[{"a":1}][', b'{"a":', b'[{"a":1}, "x', b'["a"', b"[[]"]
)
def test_what_does_not_end_is_damage(content: bytes) -> None:
    for size in (1, 3, 100):
        with pytest.raises(DamagedError, match="its JSON does not end"):
            list(values_of(in_blocks(content, size)))


decide = event_decoder((), "2030")
COMMITS = [
    {"sha": "ab", "author": {"name": "x"}, "message": '6\\" {"id":"5"}, {'},
    {"id": 7, "url": [1.5e3, None, True]},
]


def events_of(number: int) -> list[dict[str, Any]]:
    return [EVENT | {"id": str(n), "payload": {"commits": COMMITS, "n": n}} for n in range(number)]


def pretty(event: object) -> str:
    return json.dumps(event, indent=2)


LAYOUTS: dict[str, Callable[[list[str]], str]] = {
    "a line each": lambda events: "[\n" + ",\n".join(events) + "\n]\n",
    "from the bracket on": lambda events: "[" + ",\n".join(events) + "]",
    "commas first": lambda events: "[" + "\n,".join(events) + "]",
    "one line": lambda events: "[" + ", ".join(events) + "]",
    "two arrays": lambda events: "[" + ",".join(events[:2]) + "]\n[" + ",".join(events[2:]) + "]",
    "no line ends": "".join,
    "pretty array": lambda events: json.dumps([json.loads(event) for event in events], indent=1),
    "pretty objects": lambda events: "\n".join(pretty(json.loads(event)) for event in events) + "\n",
    "braces side by side": lambda events: "[" + ", ".join(pretty(json.loads(event)) for event in events) + "]",
}


def spans_of(text: str, number: int) -> list[tuple[int, int]]:
    """Return where each event of a good text stands."""
    spans: list[tuple[int, int]] = []
    for _ in range(number):
        start = text.index("{", spans[-1][1] if spans else 0)
        spans.append((start, json.JSONDecoder().raw_decode(text, start)[1]))
    return spans


@st.composite
def mutations(draw: st.DrawFn) -> Callable[[str], str]:
    """Draw a change of an event's text that leaves something of it."""
    at = draw(st.floats(0.0, 0.999))
    put = draw(st.sampled_from(['"', "{", "}", "[", "]", ",", ":", "\0", "\n", '" x', "}}", "]}", "\\", ""]))
    cut = draw(st.sampled_from([0, 0, 1, 1, 30, 10_000]))

    def mutated(text: str) -> str:
        place = int(at * len(text))
        return text[:place] + put + text[place + cut :] if place or cut < len(text) else text[:1]

    return mutated


def read(text: bytes, size: int) -> tuple[list[str], int]:
    """Return the ids of the events of a text, and how many values are none."""
    found = [value for _, value in values_of(in_blocks(text, size))]
    assert sum(map(weight_of, found)) == weight_of(text)
    outcomes = [decide(value) for value in found]
    ids = [outcome.id for outcome in outcomes if isinstance(outcome, Event)]
    if any(map(events_within, found)):
        raise DamagedError("events inside another value")
    return ids, len(outcomes) - len(ids)


@pytest.mark.parametrize("layout", LAYOUTS)
@patient
@given(
    places=st.sets(st.integers(0, 5), min_size=1, max_size=3),
    changes=st.lists(mutations(), min_size=3, max_size=3),
    is_reversed=st.booleans(),
    size=st.sampled_from([37, 1_000, 100_000]),
)
def test_a_bad_event_costs_itself_only_and_is_counted(
    layout: str, places: set[int], changes: Sequence[Callable[[str], str]], is_reversed: bool, size: int
) -> None:
    events = [dict(reversed(event.items())) if is_reversed else event for event in events_of(6)]
    text = LAYOUTS[layout]([json.dumps(event) for event in events])
    spans = spans_of(text, 6)
    for place, change in zip(sorted(places, reverse=True), changes, strict=False):
        start, end = spans[place]
        text = text[:start] + change(text[start:end]) + text[end:]
    try:
        ids, bad = read(text.encode(), size)
    except DamagedError:
        return
    assert {str(n) for n in range(6) if n not in places} <= set(ids)
    # A broken one whose start is gone can't be told from a broken one before it.
    if not any(place + 1 in places for place in places):
        assert bad >= 6 - len(ids)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("places", "old", "new"),
    [
        ([200, 800], "octo/repo", '6" disk'),
        ([999], "octo/repo", '6" disk'),
        ([0], "octo/repo", '6" disk'),
        ([200, 201, 800], '"repo":', '"repo:'),
        ([999], "}", ""),
        ([0, 500], "}", ""),
        ([500], "}", "}}"),
        ([500], '"commits": [', '"commits": '),
        ([500], '"x"', '"\n{"'),
    ],
)
def test_few_bad_events_among_many_good_ones_are_few(layout: str, places: list[int], old: str, new: str) -> None:
    text = LAYOUTS[layout]([json.dumps(event) for event in events_of(1_000)])
    spans = spans_of(text, 1_000)
    for place in reversed(places):
        start, end = spans[place]
        assert old in text[start:end]
        text = text[:start] + new.join(text[start:end].rsplit(old, 1)) + text[end:]
    if places == [999] and old == "}" and layout in ("no line ends", "pretty objects"):
        with pytest.raises(DamagedError):
            read(text.encode(), 10_000)
        return
    ids, bad = read(text.encode(), 10_000)
    assert {str(n) for n in range(1_000) if n not in places} <= set(ids)
    assert 1_000 - len(ids) <= bad <= 3 * len(places)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_event_that_ends_with_another_ones_end_does_not_hide_what_is_between(layout: str) -> None:
    # Brackets that fit as a whole: the first lacks an end, a later one has one too many.
    events = [json.dumps(event) for event in events_of(6)]
    text = LAYOUTS[layout](events)
    (start, end), (start_4, end_4) = (spans_of(text, 6)[place] for place in (1, 4))
    tail = text[text.index("}", text.index('"url"', text.index('"commits"', start))) : end]
    text = text[: end - len(tail)] + "}" + text[end:end_4] + tail[1:] + text[end_4:]
    assert start < start_4
    if layout == "one line":
        # Whether they are its own is not certain here.
        assert sorted(events_within(value) for _, value in values_of([text.encode()])) == [0, 0, 3]
        return
    ids, bad = read(text.encode(), 100_000)
    assert {"0", "2", "3", "5"} <= set(ids)
    assert bad >= 6 - len(ids)


def cut(event: dict[str, Any]) -> str:
    text = json.dumps(event)
    return text[: text.index('{"id": 7')] + "5"


def array(texts: list[str]) -> str:
    return f"[{', '.join(texts)}]"


WRONG: dict[str, Callable[[int], str]] = {
    "a printed list": lambda number: str(events_of(number)),
    "ids of a database": lambda number: array(['{"_id": ObjectId("5f")}'] * 8 * number),
    "words": lambda number: array(["{hello}"] * 8 * number),
    "braces": lambda number: "{" * 40 * number,
    "objects that do not end": lambda number: '{"a":' * 40 * number,
    "objects in arrays that do not end": lambda number: '[{"a":' * 40 * number,
    "actors that do not end": lambda number: '{"actor":' * 40 * number,
    "quotes": lambda number: '{"' * 40 * number,
    "cut inside an array": lambda number: array(list(map(cut, events_of(number)))),
    "cut inside an array, a line each": lambda number: (
        "[\n"
        + ",\n".join(cut(event) if n % 3 else json.dumps(event) for n, event in enumerate(events_of(number)))
        + "]"
    ),
    "one quote missing in each": lambda number: array(
        [json.dumps(event).replace('"repo"', '"repo', 1) for event in events_of(number)]
    ),
    "an object that lists what is cut": lambda number: (
        '{"events": [\n' * 20 * number + json.dumps(events_of(1)[0]) + ","
    ),
}


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize(("block", "is_line"), [(1 << 20, False), (1_000, False), (0, True)])
def test_the_work_for_a_wrong_file_grows_with_its_length_only(
    kind: str, block: int, is_line: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = 0

    def decoded(text: str, at: int) -> tuple[Any, int]:
        nonlocal work
        try:
            end = decode(text, at)[1]
        except json.JSONDecodeError as error:
            # The error counts the lines before it, a hundred bytes in the time of one that is decoded.
            work += error.pos - at + error.pos // 100
            raise
        except RecursionError:
            work += len(text) - at
            raise
        work += end - at
        return None, end

    class Counted(unpack._Values):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            made.append(self)

    decode, made = unpack._decode, list[Counted]()
    monkeypatch.setattr(unpack, "_decode", decoded)
    monkeypatch.setattr(unpack, "_Values", Counted)

    def work_for(number: int) -> int:
        nonlocal work
        work = 0
        made.clear()
        text = WRONG[kind](number).encode()
        with suppress(DamagedError):
            list(values_of([text] if is_line else in_blocks(text, block), is_line=is_line))
        return work + sum(found.steps for found in made)

    small, large = work_for(100), work_for(400)
    # With the square of the length it would be sixteen times as much; blocks that double may add one more look.
    assert 0 < large <= 9 * small


PAYLOADS: dict[str, str] = {
    "an object": '"old": {event}',
    "among others": '"old": {event}, "n": 5',
    "a list of one": '"old": [{event}]',
    "a list": '"old": [{event}, {event}]',
    "a list with more": '"old": [5, {event}, {event}, 5]',
    "deep": '"old": {{"older": [{{"oldest": {event}}}]}}',
}


@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize("cut", [0, 1, 5, 60])
@pytest.mark.parametrize("around", ["{}", "\ufeff{} \r", "{},"])
def test_an_event_inside_a_broken_line_is_none_of_its_own(payload: str, cut: int, around: str) -> None:
    first, inner = json.dumps(EVENT | {"id": "1"}), json.dumps(EVENT | {"id": "77"})
    inside = PAYLOADS[payload].format(event=inner)
    broken = first.replace('"public": true', f'"x": 6" disk, "data": {{{inside}}}, "public": true', 1)
    line = around.format(broken[: len(broken) - cut]).encode()
    values = [value for _, value in values_of([line], is_line=True)]
    assert not [value for value in values if isinstance(decide(value), Event)]
    assert sum(value.startswith(b"{") for value in values) == 1
    # What stands alongside it is one all the same.
    alongside = json.dumps(EVENT | {"id": "78"})
    for glue in ("", " ", ",", "\r"):
        values = [value for _, value in values_of([f"{broken}{glue}{alongside}".encode()], is_line=True)]
        assert [value.id for value in map(decide, values) if isinstance(value, Event)] == ["78"]


@pytest.mark.parametrize("is_open", [False, True])
@pytest.mark.parametrize("head", ['{"events": [', '{"total": 2, "next": null, "items" : [', '{"a": {"b": ['])
@pytest.mark.parametrize("gap", ["\n", "", "\r\n  "])
def test_an_object_that_lists_events_a_line_each_is_one_value(head: str, gap: str, is_open: bool) -> None:
    events = ",\n".join(map(json.dumps, events_of(50)))
    text = f"{head}{gap}{events}\n]{'}' * head.count('{')}\n".encode()
    for size in (100, 1_000, 100_000):
        if is_open:
            with pytest.raises(DamagedError, match="open at line 1"):
                list(values_of(in_blocks(text[:-3], size)))
        else:
            assert [(line, events_within(value)) for line, value in values_of(in_blocks(text, size))] == [(1, 50)]


def test_text_that_is_good_as_far_as_it_goes_is_damage_wherever_it_is_cut() -> None:
    text = rb'[{"a": [1, -2.5e+30, true, false, null, "x\u12ab\ud83d\ude00\n\\"], "b" : {}}, [ ] , "c"]'
    for end in range(1, len(text)):
        with pytest.raises(DamagedError, match="its JSON does not end"):
            list(values_of([text[:end]]))


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        (b'{"a":1}{"b":[2]}', [E1, E2]),
        (b'\xef\xbb\xbf[{"a":1},{"b":[2]}]\r', [E1, E2]),
        (b'[{"a":1}] [{"b":[2]}]', [E1, E2]),
        (b'{"a":1}\r{"b":[2]}\r', [E1, E2]),
        (b'{"a":1}{"b":[2', [E1, b'{"b":[2']),
        (b'[{"a":1},{"b":[2]}', [E1, E2, b"["]),
        (b'{"a":1}{"id":"1","type":"Pu{"id":"2"}', [E1, b'{"id":"1","type":"Pu', b'{"id":"2"}']),
        (b'"id": 5,', [b'"id": 5']),
        (b"{", [b"{"]),
    ],
)
def test_what_does_not_end_is_the_last_value_of_a_line(line: bytes, wanted: list[bytes]) -> None:
    assert list(values_of([line], is_line=True)) == [(1, value) for value in wanted]


def test_a_row_of_zeros_of_any_length_takes_no_more_memory_than_the_longest_value(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(unpack, "_LONGEST_VALUE", 1_000)
    content = b'[{"a":1}]' + bytes(5_000) + b"[5]"
    lengths = [len(value) for _, value in values_of(in_blocks(content, 100))]
    assert (lengths[0], sum(lengths[1:-1]), lengths[-1]) == (7, 5_000, 1)
    assert max(lengths) <= 1_100


def test_an_object_that_never_ends_is_told_without_looking_at_it_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpack, "_LONGEST_VALUE", 1_000)
    blocks = iter([b'[{"a":1},{"b":"', *[b"x" * 100] * 1_000])
    with pytest.raises(TooLongError, match="what begins at line 1 does not end within"):
        list(values_of(blocks))
    assert len(list(blocks)) > 900


PACK: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "zstd": lambda content: bytes(pa.compress(content, "zstd", asbytes=True)),
}


@pytest.mark.parametrize("packing", PACK)
@patient
@given(content=st.binary(min_size=1, max_size=3_000), cuts=st.lists(st.integers(1, 3_000), max_size=4))
def test_any_number_of_members_unpacks_to_their_content(packing: str, content: bytes, cuts: list[int]) -> None:
    bounds = sorted({0, *(cut for cut in cuts if cut < len(content)), len(content)})
    packed = b"".join(PACK[packing](content[a:b]) for a, b in pairwise(bounds))
    assert packing_of(packed) == packing
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unpack, "_PACKED_BLOCK", 50)
        raw = io.BytesIO(packed)
        assert b"".join(unpacked(raw, packing)) == content
        assert (raw.closed, raw.tell()) == (False, len(packed))


@pytest.mark.parametrize("packing", ["gzip", "bzip2"])
@pytest.mark.parametrize("zeros", [1, 511, 200_000])
def test_padding_with_zeros_is_no_damage(packing: str, zeros: int) -> None:
    packed = PACK[packing](b"a") + bytes(zeros) + PACK[packing](b"b") + bytes(zeros)
    assert b"".join(unpacked(io.BytesIO(packed), packing)) == b"ab"


@pytest.mark.parametrize("kind", [0x50, 0x5F])
def test_frames_to_be_skipped_are_no_content_wherever_they_stand(kind: int) -> None:
    skipped = bytes([kind, 0x2A, 0x4D, 0x18, 4, 0, 0, 0]) + b"\0size"[:4]
    packed = skipped + PACK["zstd"](b"a") + skipped + PACK["zstd"](b"b") + skipped
    assert packing_of(packed) == "zstd"
    assert b"".join(unpacked(io.BytesIO(packed), "zstd")) == b"ab"


@pytest.mark.parametrize("tail", [bytes(512), b"junk" * 10])
def test_what_zstd_does_not_skip_is_told_as_that(tail: bytes) -> None:
    with pytest.raises(DamagedError, match="its zstd data goes on with something else, such as zeros"):
        list(unpacked(io.BytesIO(PACK["zstd"](b"a") + tail), "zstd"))


@pytest.mark.parametrize("packing", PACK)
@patient
@given(content=st.binary(min_size=1, max_size=300), kept=st.floats(0.0, 0.99))
def test_what_is_cut_anywhere_is_damage(packing: str, content: bytes, kept: float) -> None:
    packed = PACK[packing](content)
    with pytest.raises(DamagedError, match=f"its {packing} data"):
        list(unpacked(io.BytesIO(packed[: max(1, int(len(packed) * kept))]), packing))


@pytest.mark.parametrize("key", ["actor", "payload", "repo", "other"])
@pytest.mark.parametrize("end", ["\n", "\n}\n", ",\n"])
@pytest.mark.parametrize("size", [7, 1_000])
def test_an_event_that_stands_where_the_value_of_a_torn_line_would_is_no_error(key: str, end: str, size: int) -> None:
    text = f'{{"{key}":\n{json.dumps(EVENT)}{end}'.encode()
    with suppress(DamagedError):
        assert weight_of(text) == sum(weight_of(value) for _, value in values_of(in_blocks(text, size)))
