"""Thin Dagster: assets, checks, jobs, sensors and resources that call the flows and report their results."""

import warnings

from dagster import BetaWarning, PreviewWarning

# The locked version of Dagster decides whether beta parameters work, so users need no warning.
for _kind in (BetaWarning, PreviewWarning):
    warnings.filterwarnings("ignore", category=_kind)
