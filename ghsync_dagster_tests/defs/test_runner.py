"""What the command line tells of a run that failed: the error's own words, and whose fault it is."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest

from ghsync_dagster import definitions
from ghsync_dagster.cli import runner
from ghsync_dagster.defs.resources import BatchResource, SparkResource
from ghsync_dagster.domain.errors import ConfigError, GhsyncError, PermanentError, TransientError, UnavailableError

if TYPE_CHECKING:
    from pathlib import Path

    from ghsync_dagster.batch.flow import BatchFlow

FAILURES: list[tuple[Exception, type[Exception], str]] = [
    (ConfigError("No such rule.", way_out="Name one."), PermanentError, "No such rule."),
    (UnavailableError("MongoDB is away.", way_out="Start it."), TransientError, "MongoDB is away."),
    (OSError(28, "No space left on device"), PermanentError, "No space left on device"),
    (PermissionError(13, "Permission denied", "/data"), PermanentError, "Permission denied"),
    (ZeroDivisionError("by nothing"), RuntimeError, "by nothing"),
]


@pytest.mark.parametrize(("error", "kind", "words"), FAILURES, ids=lambda value: getattr(value, "__name__", ""))
def test_a_failed_step_is_told_in_the_words_of_its_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception, kind: type[Exception], words: str
) -> None:
    def read(_: object) -> None:
        raise error

    class Failing(BatchResource):
        def build(self, run_id: str | None = None) -> BatchFlow:
            del run_id
            return cast("BatchFlow", SimpleNamespace(read=read, check_first=lambda *_, **__: None))

    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    failing = definitions.build_defs({"batch": Failing(spark=SparkResource())})
    monkeypatch.setattr(runner, "build_defs", lambda: failing)
    with pytest.raises(kind, match=words) as told:
        runner.materialize_batch()
    assert "Error occurred while executing" not in str(told.value)
    if isinstance(told.value, GhsyncError):
        assert told.value.way_out
