"""How files are dealt out to tasks: every byte once, and no task much longer than the others."""

from __future__ import annotations

from collections import defaultdict

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ghsync_dagster.batch.files import InputFile
from ghsync_dagster.batch.read import _cost, _largest_piece, plan_tasks
from ghsync_dagster.batch.versions import FileState

# Times depend on what else the machine does.
patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
MIB = 1 << 20


def file_of(size: int, packing: str | None = None, *, path: str = "/in/a.json", **kind: bool) -> InputFile:
    """Return a file of a size."""
    return InputFile(FileState(path, size, 0, 0, 1), packing, **kind)


files = st.builds(
    file_of,
    size=st.integers(1, 300 * MIB),
    packing=st.sampled_from([None, None, "gzip", "bzip2", "zstd"]),
    is_utf16=st.booleans(),
    has_lines=st.booleans(),
)


@patient
@given(st.lists(files, min_size=1, max_size=40), st.integers(1, 64))
def test_every_byte_of_every_file_is_in_one_task(inputs: list[InputFile], cores: int) -> None:
    spans: defaultdict[int, list[tuple[int, int]]] = defaultdict(list)
    for pieces in plan_tasks(inputs, cores):
        for piece in pieces:
            assert piece.file is inputs[piece.number]
            spans[piece.number].append((piece.start, inputs[piece.number].size if piece.end is None else piece.end))
            if piece.end is not None:
                assert len(pieces) == 1
                assert piece.file.has_lines
                assert (piece.file.packing, piece.file.is_utf16) == (None, False)
    for number, file in enumerate(inputs):
        ends = [0]
        for start, end in sorted(spans[number]):
            assert start == ends[-1] < end
            ends.append(end)
        assert ends[-1] == file.size


@patient
@given(st.lists(files, min_size=1, max_size=40), st.integers(1, 64))
def test_no_task_costs_more_than_allowed_but_for_one_file_that_is_read_whole(
    inputs: list[InputFile], cores: int
) -> None:
    largest = _largest_piece(inputs, cores)
    for pieces in plan_tasks(inputs, cores):
        if len(pieces) > 1:
            assert sum(_cost(piece.file) for piece in pieces) <= largest
        elif pieces[0].end is not None:
            assert pieces[0].end - pieces[0].start <= largest


@pytest.mark.parametrize(
    ("sizes", "packing", "tasks"),
    [
        ([14 * MIB], None, 2),
        ([170_000] * 200, "gzip", 8),
        ([8 * MIB] * 24, "gzip", 24),
        ([500] * 50_000, None, 13),
        ([2_000 * MIB], None, 32),
    ],
)
def test_two_cores_have_enough_tasks_to_share_and_not_too_many(
    sizes: list[int], packing: str | None, tasks: int
) -> None:
    planned = plan_tasks([file_of(size, packing, path=f"/in/{n}") for n, size in enumerate(sizes)], cores=2)
    assert tasks <= len(planned) <= tasks * 1.3


def test_the_costly_ones_come_first() -> None:
    inputs = [file_of(MIB), file_of(200 * MIB, "gzip"), file_of(30 * MIB)]
    order = [pieces[0].number for pieces in plan_tasks(inputs, cores=2)]
    assert order[0] == 1
    assert order[-1] == 0
