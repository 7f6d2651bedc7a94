"""Measurements of ghsync alongside its peers, on one machine in one run. Nothing here is imported by the package."""
