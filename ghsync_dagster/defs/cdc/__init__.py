"""The change flow in Dagster: external assets, slices of consumption, their supervisor, and the checks."""
