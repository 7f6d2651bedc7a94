"""Thin Dagster: assets, checks, jobs, sensors and resources that call the flows and report their results."""

import warnings

from dagster import BetaWarning, PreviewWarning

# Whether a parameter in beta is used is decided where a version of Dagster is locked: a user can't act on it.
for _kind in (BetaWarning, PreviewWarning):
    warnings.filterwarnings("ignore", category=_kind)
