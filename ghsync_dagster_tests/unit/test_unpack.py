"""Bytes of files: however they come in blocks, nothing is lost, doubled or joined, and what is not whole is told."""

from __future__ import annotations

import bz2
import gzip
import io
import json
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ghsync_dagster.batch import unpack
from ghsync_dagster.batch.unpack import (
    DamagedError,
    lines_of,
    packing_of,
    range_of_lines,
    unpacked,
    values_of,
    weight_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable

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
    with pytest.raises(DamagedError, match="line 1 is not closed"):
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
