"""Shortening of text for display. Not here: which text."""

from __future__ import annotations


def shortened(text: str, limit: int) -> str:
    """Return a text of up to ``limit`` characters as it is, a longer one cut there, with three dots.

    >>> shortened("octocat", 7), shortened("octocats", 7)
    ('octocat', 'octocat...')
    """
    return text if len(text) <= limit else f"{text[:limit]}..."
