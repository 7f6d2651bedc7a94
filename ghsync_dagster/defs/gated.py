"""An executor that fails a run after non-blocking checks that did not pass, so `dagster job execute` exits with 1.

Dagster fails a run on blocking checks only, and these would also block downstream assets. Not here: which job uses it,
and the alert of a failed check.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import dagster as dg

from ghsync_dagster.defs.errors import ChecksFailedError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dagster._core.execution.context.system import PlanOrchestrationContext
    from dagster._core.execution.plan.plan import ExecutionPlan
    from dagster._core.execution.retries import RetryMode


class _GatedExecutor(dg.Executor):
    """Runs a job with another executor, then fails the run if a check did not pass."""

    def __init__(self, inner: dg.Executor) -> None:
        self._inner = inner

    @property
    def retries(self) -> RetryMode:
        """The other executor's retries."""
        return self._inner.retries

    def execute(
        self, plan_context: PlanOrchestrationContext, execution_plan: ExecutionPlan
    ) -> Iterator[dg.DagsterEvent]:
        """Yield the events of the other executor.

        Raises:
            ChecksFailedError: A check did not pass. All of them have been evaluated.
        """
        failed: list[str] = []
        for event in self._inner.execute(plan_context, execution_plan):
            if event.event_type is dg.DagsterEventType.ASSET_CHECK_EVALUATION:
                found = event.asset_check_evaluation_data
                if not found.passed:
                    failed.append(found.check_name)
            yield event
        if failed:
            raise ChecksFailedError(f"Checks did not pass: {', '.join(failed)}. Each has its way out in its metadata.")


def _make(context: dg.InitExecutorContext) -> dg.Executor:
    make = dg.in_process_executor.executor_creation_fn
    assert make is not None  # noqa: S101  Dagster's executor has one
    return _GatedExecutor(make(context))


gated_executor = dg.ExecutorDefinition(
    name="gated",
    config_schema=dg.in_process_executor.config_schema,  # type: ignore[arg-type]  # it takes what it has resolved
    executor_creation_fn=_make,
    description="Runs all steps in this process, and fails the run where a check did not pass.",
)
