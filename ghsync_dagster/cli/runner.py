"""Running the batch job in this process, for the command line: the same job, checks and event log as in the UI.

Not here: what is printed, and exit codes.
"""

from __future__ import annotations

import builtins
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import dagster as dg

from ghsync_dagster.definitions import build_defs
from ghsync_dagster.defs.errors import root_cause
from ghsync_dagster.domain.errors import WAY_OUT, PermanentError, TransientError
from ghsync_dagster.domain.finding import Finding

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dagster_shared.error import SerializableErrorInfo


@dataclass(frozen=True, slots=True)
class BatchOutcome:
    """How the job ended: whether it succeeded, the checks that were evaluated, and the run's id."""

    success: bool
    findings: Sequence[Finding]
    run_id: str


def materialize_batch(events_paths: Sequence[str] = ()) -> BatchOutcome:
    """Run ``users_batch_job`` in this process on the instance in ``DAGSTER_HOME``.

    Args:
        events_paths: Override GHSYNC_EVENTS_PATH.

    Raises:
        PermanentError: A step failed on configuration, input or credentials.
        TransientError: A step failed because a server is away.
        RuntimeError: A step failed by a fault of ghsync itself.
    """
    job = build_defs().resolve_job_def("users_batch_job")
    named = {"events_path": json.dumps(list(events_paths))}
    config = {"ops": {"read_events": {"config": named}}} if events_paths else {}
    with dg.DagsterInstance.get() as instance:
        result = job.execute_in_process(
            run_config={**config, "loggers": {"console": {"config": {"log_level": "CRITICAL"}}}},
            instance=instance,
            raise_on_error=False,
        )
    findings = [_as_finding(evaluation) for evaluation in result.get_asset_check_evaluations()]
    if not result.success and all(finding.passed for finding in findings):
        raise _step_error(result)
    return BatchOutcome(result.success, findings, result.run_id)


def _as_finding(evaluation: dg.AssetCheckEvaluation) -> Finding:
    way_out = evaluation.metadata.get("way_out")
    return Finding(
        check=evaluation.check_name,
        passed=evaluation.passed,
        summary=evaluation.description or "",
        way_out=str(way_out.value) if way_out else "",
    )


def _raise_if_interrupted(event: dg.DagsterEvent) -> None:
    error = event.step_failure_data.error
    if error is not None and error.cls_name in ("DagsterExecutionInterruptedError", "KeyboardInterrupt"):
        raise KeyboardInterrupt


def _unexpected(step: str, error: SerializableErrorInfo | None) -> PermanentError | RuntimeError:
    """Return the error for an exception that is no ``GhsyncError``: of the system, or a fault of ghsync itself."""
    error = root_cause(error)
    if error is None:
        return RuntimeError(f"{step} failed without an error")
    kind = getattr(builtins, error.cls_name or "", Exception)
    if isinstance(kind, type) and issubclass(kind, OSError):
        return PermanentError(
            f"{step}: {error.message.strip()}", way_out="Check the path, its permissions and the disk."
        )
    return RuntimeError(f"{step} failed:\n{error.to_string()}")


def _step_error(result: dg.ExecuteInProcessResult) -> PermanentError | TransientError | RuntimeError:
    """Return the error of the first step that failed, in ghsync's own words."""
    for event in result.all_events:
        if event.is_step_failure:
            _raise_if_interrupted(event)
            failure = event.step_failure_data.user_failure_data
            error = event.step_failure_data.error
            if failure is None:
                return _unexpected(str(event.step_key), error)
            description = failure.description or ""
            tag = failure.metadata.get("kind")
            transient = tag is not None and tag.value == "infrastructure"
            message, _, way_out = description.partition(WAY_OUT)
            kind = failure.metadata.get("error")
            message = message.removeprefix(f"{kind.value}: ") if kind else message
            error_type = TransientError if transient else PermanentError
            return error_type(message, way_out=way_out or "See the run in the Dagster UI: make dev.")
    return PermanentError("The run failed before its first step.", way_out="See the run in the Dagster UI: make dev.")
