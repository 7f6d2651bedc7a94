"""What the launchpad may set has bounds: a share is no percentage, and no time or count is negative."""

# No annotations from __future__: Dagster wants the types of config, not their names.
from typing import Any

import dagster as dg
import pytest
from pydantic import ValidationError

from ghsync_dagster.definitions import defs
from ghsync_dagster.defs.batch.checks import QuarantineConfig
from ghsync_dagster.settings import Settings

NUMBERS = [
    pytest.param(config, name, id=f"{config.__name__}.{name}")
    for config in dg.Config.__subclasses__()
    if config.__module__.startswith("ghsync_dagster.")
    for name, field in config.model_fields.items()
    if field.annotation in (int, float, int | None, float | None)
]


def test_the_numbers_of_the_launchpad_are_found() -> None:
    assert defs.jobs
    assert len(NUMBERS) >= 11


@pytest.mark.parametrize(("config", "name"), NUMBERS)
def test_a_number_is_refused_outside_its_bounds(config: type[dg.Config], name: str) -> None:
    for value in (-1, float("nan")):
        with pytest.raises(ValidationError, match=name):
            config(**{name: value})
    if setting := Settings.model_fields.get(name):
        assert config.model_fields[name].metadata == setting.metadata


def test_a_run_with_a_percentage_for_the_share_of_bad_lines_fails() -> None:
    @dg.op
    def gate(config: QuarantineConfig) -> None:
        del config

    @dg.job
    def gates() -> None:
        gate()

    def run(ratio: float | None) -> Any:
        return gates.execute_in_process(run_config={"ops": {"gate": {"config": {"max_quarantined_ratio": ratio}}}})

    assert run(0.05).success
    assert run(None).success
    with pytest.raises(ValidationError, match="less than or equal to 1"):
        run(5)
