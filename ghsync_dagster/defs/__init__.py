"""Thin Dagster: assets, checks, jobs, sensors and resources that call the flows and report their results."""
