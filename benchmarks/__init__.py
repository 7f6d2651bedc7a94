"""Measurements of ghsync beside its peers, on one machine in one run. Nothing here is imported by the package."""
