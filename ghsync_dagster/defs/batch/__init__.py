"""Dagster definitions: batch."""
