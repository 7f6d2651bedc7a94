"""``.env.example`` lists every setting, as the settings themselves describe it."""

from __future__ import annotations

from pathlib import Path

from ghsync_dagster.settings import Settings, example_env

EXAMPLE = Path(__file__).parents[2] / ".env.example"


def test_env_example_is_what_the_settings_say() -> None:
    way_out = "regenerate it: python -m ghsync_dagster.settings > .env.example"
    assert EXAMPLE.read_text(encoding="utf-8") == example_env(), way_out


def test_env_example_names_every_variable() -> None:
    lines = EXAMPLE.read_text(encoding="utf-8").splitlines()
    for field in Settings.model_fields.values():
        assert any(line.startswith(f"# {field.validation_alias}=") for line in lines)
