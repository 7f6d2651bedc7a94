"""GTIDs and positions: what is read, what a set contains, and what can't be compared."""

from __future__ import annotations

from itertools import permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ghsync_dagster.domain.binlog import Gtid, GtidSet, read_gtid
from ghsync_dagster.domain.change import Position

ONE = "3e11fa47-71ca-11e1-9e33-c80aa9429562"
TWO = "4e11fa47-71ca-11e1-9e33-c80aa9429562"
PLAIN = ONE.replace("-", "")

# one GTID


@pytest.mark.parametrize(
    ("text", "gtid"),
    [
        (f"{ONE}:23", Gtid(PLAIN, 23)),
        (f" {ONE.upper()} : 23 ", Gtid(PLAIN, 23)),
        (f"{ONE}:Backup_1:23", Gtid(f"{PLAIN}:backup_1", 23)),
        ("0-1-100", Gtid("0-1", 100)),
        ("4294967295-4294967295-18446744073709551615", Gtid("4294967295-4294967295", 2**64 - 1)),
    ],
)
def test_a_gtid_is_a_sequence_and_a_number(text: str, gtid: Gtid) -> None:
    assert read_gtid(text) == gtid


@pytest.mark.parametrize(
    "text",
    [None, "", "ANONYMOUS", ONE, f"{ONE}:", f"{ONE}:tag", f"{ONE}:1-5", f"{ONE}:1:tag", f"{ONE}:a:b:1", f"{ONE[1:]}:1",
     "0-1", "0-1-2-3", "0-1-2,0-1-3", "-1-1-1", "0-1-\u0661"],
)  # fmt: skip
def test_what_is_no_gtid_is_none(text: str | None) -> None:
    assert read_gtid(text) is None
    assert GtidSet.parse(f"{ONE}:1-9").contains(text) is None


# sets


@pytest.mark.parametrize(
    ("text", "gtid", "contained"),
    [
        (f"{ONE}:1-5:7", f"{ONE}:5", True),
        (f"{ONE}:1-5:7", f"{ONE}:6", False),
        (f"{ONE}:1-5:7", f"{ONE}:7", True),
        (f"{ONE}:1-5:7", f"{ONE}:8", False),
        (f"{ONE}:3-5", f"{ONE}:2", False),
        (f"{ONE}:1-5", f"{TWO}:1", False),
        (f"{ONE}:1-5,\n{TWO}:1-9", f"{TWO.upper()}:9", True),
        (f" {ONE.upper()} : 1 - 5 ,\n\n", f"{ONE}:3", True),
        (f"{ONE}:1-5:tag:1-2:7:other:4", f"{ONE}:tag:7", True),
        (f"{ONE}:1-5:tag:1-2:7:other:4", f"{ONE}:TAG:3", False),
        (f"{ONE}:1-5:tag:1-2:7:other:4", f"{ONE}:other:4", True),
        (f"{ONE}:1-5:tag:1-2:7:other:4", f"{ONE}:4", True),
        (f"{ONE}:tag:1-3", f"{ONE}:2", False),
        (f"{ONE}:1-3", f"{ONE}:tag:2", False),
        (f"{ONE}:5-3:7", f"{ONE}:4", False),
        (f"{{{ONE}}}:1", f"{PLAIN}:1", True),
        ("0-1-100,1-2-5", "0-1-100", True),
        ("0-1-100,1-2-5", "0-7-99", True),
        ("0-1-100,1-2-5", "0-7-101", False),
        ("0-1-100, 1-2-5", "1-9-6", False),
        ("0-1-100", "5-1-1", False),
        ("0-1-100,0-2-90", "0-1-95", True),
    ],
)
def test_a_set_tells_what_it_contains(text: str, gtid: str, contained: bool) -> None:
    assert GtidSet.parse(text).contains(gtid) is contained


@pytest.mark.parametrize(
    ("text", "gtid"),
    [
        (None, f"{ONE}:1"),
        ("", f"{ONE}:1"),
        (" ,\n", "0-1-1"),
        (f"{ONE}:1-5", "0-1-3"),
        ("0-1-100", f"{ONE}:1"),
        (f"0-1-100,{ONE}:1-5", "0-1-3"),
        (f"0-1-100,{ONE}:1-5", f"{ONE}:3"),
        (f"{ONE}:1-5,what", f"{ONE}:3"),
        (f"{ONE}", f"{ONE}:3"),
        (f"{ONE}:tag", f"{ONE}:3"),
        (f"{ONE}:1-5:tag", f"{ONE}:3"),
        (f"{ONE}:1-x", f"{ONE}:1"),
        ("mysql-bin.000003", f"{ONE}:1"),
    ],
)
def test_nothing_is_told_by_a_set_of_another_kind_or_that_cannot_be_read(text: str | None, gtid: str) -> None:
    assert GtidSet.parse(text).contains(gtid) is None


SEQUENCES = st.sampled_from([ONE, TWO, f"{ONE}:tag", f"{TWO}:other_1"])
INTERVALS = st.tuples(SEQUENCES, st.integers(1, 30), st.integers(0, 8))


@settings(max_examples=500)
@given(st.lists(INTERVALS, min_size=1, max_size=12))
def test_a_set_of_mysql_contains_exactly_what_its_intervals_list(
    intervals: list[tuple[str, int, int]],
) -> None:
    listed = {(sequence, number) for sequence, low, more in intervals for number in range(low, low + more + 1)}
    text = ",\n".join(
        f"{sequence}:{low}-{low + more}" if more else f"{sequence}:{low}" for sequence, low, more in intervals
    )
    found = GtidSet.parse(text)
    for sequence in (ONE, TWO, f"{ONE}:tag", f"{TWO}:other_1"):
        for number in range(1, 45):
            told = found.contains(f"{sequence}:{number}")
            assert told is ((sequence, number) in listed)


@settings(max_examples=200)
@given(st.dictionaries(st.integers(0, 3), st.tuples(st.integers(1, 9), st.integers(1, 20)), min_size=1))
def test_a_position_of_mariadb_contains_all_of_a_domain_up_to_its_last(last: dict[int, tuple[int, int]]) -> None:
    found = GtidSet.parse(",".join(f"{domain}-{server}-{number}" for domain, (server, number) in last.items()))
    for domain in range(5):
        for number in range(1, 25):
            contained = domain in last and number <= last[domain][1]
            assert found.contains(f"{domain}-5-{number}") is contained


@settings(max_examples=300)
@given(
    st.text(alphabet="0123456789abcdef-:, \n{}tag_", max_size=60), st.text(alphabet="0123456789abcdef-:g", max_size=50)
)
def test_any_text_is_a_set_and_any_text_can_be_asked_for(text: str, gtid: str) -> None:
    assert GtidSet.parse(text).contains(gtid) in (True, False, None)


# positions

HERE = "1/mysql-bin"


def place(pos: int, file: int = 3, row: int = 0, server: str = HERE, gtid: str | None = None) -> Position:
    return Position(file, pos, row, server, gtid)


def test_positions_of_one_server_are_ordered_within_a_file_and_across_files() -> None:
    places = [place(900, 9), place(1000, 9), place(4, 10), place(4, 999_999), place(4, 1_000_000)]
    for (first, one), (second, other) in permutations(enumerate(places), 2):
        assert one.compare(other) == (first > second) - (first < second)


def test_rows_of_one_event_or_transaction_are_not_ordered() -> None:
    # With MariaDB the number of the row begins again in each event, and all events of a transaction have one position.
    assert place(900, row=67, gtid="0-1-7").compare(place(900, row=0, gtid="0-1-7")) == 0


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (place(4), place(9, server="2/mysql-bin")),
        (place(4), place(9, server="1/binlog")),
        (place(4, server=""), place(9, server="")),
        (place(4), place(9, server="")),
        # A transaction that a replica relays has the server_id of its primary, and a position in the replica's binlog.
        (place(4, gtid=f"{ONE}:5"), place(9, gtid=f"{TWO}:6")),
        (place(4, gtid=f"{ONE}:5"), place(9)),
        (place(4, gtid=f"{ONE}:5"), place(9, gtid=f"{ONE}:tag:6")),
        (place(4, gtid=f"{ONE}:5"), place(9, gtid="0-1-6")),
        (place(4, gtid="0-1-5"), place(9, gtid="0-2-6")),
        (place(4, gtid="0-1-5"), place(9, gtid="1-1-6")),
        (place(4, gtid="?"), place(9, gtid="?")),
        (place(4, gtid=f"{ONE}:5"), place(9, server="1/relay-bin", gtid=f"{ONE}:5")),
    ],
)
def test_positions_of_two_servers_or_of_an_unknown_one_are_not_compared(one: Position, other: Position) -> None:
    assert one.compare(other) is None
    assert other.compare(one) is None


@pytest.mark.parametrize("gtids", [(f"{ONE}:5", f"{ONE}:6"), ("0-1-5", "0-1-6"), (f"{ONE}:tag:9", f"{ONE}:tag:10")])
@pytest.mark.parametrize("server", [HERE, "1/relay-bin", ""])
def test_gtids_of_one_sequence_are_ordered_whichever_server_they_are_read_from(
    gtids: tuple[str, str], server: str
) -> None:
    earlier, later = place(900, 7, gtid=gtids[0]), place(4, 1, server=server, gtid=gtids[1])
    assert earlier.compare(later) == -1
    assert later.compare(earlier) == 1


POSITIONS = st.builds(
    Position,
    st.integers(1, 2),
    st.integers(1, 3),
    st.integers(0, 1),
    st.sampled_from(["", HERE, "2/mysql-bin"]),
    st.sampled_from([None, f"{ONE}:1", f"{ONE}:2", f"{TWO}:1", "0-1-1", "0-1-2", "?"]),
)


@settings(max_examples=2_000)
@given(POSITIONS, POSITIONS, POSITIONS)
def test_comparing_is_a_partial_order(one: Position, other: Position, third: Position) -> None:
    order = one.compare(other)
    back = other.compare(one)
    assert back == (None if order is None else -order)
    if order is not None and order <= 0 and (other.compare(third) or 0) < 0 and one.compare(third) is not None:
        assert one.compare(third) == -1
