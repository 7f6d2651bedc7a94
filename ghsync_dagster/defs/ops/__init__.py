"""Dagster definitions: ops."""
