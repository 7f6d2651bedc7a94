"""How text is cut to be shown. Belongs here: what any room does to a text for its reader. Not here: which text."""

from __future__ import annotations


def shortened(text: str, limit: int) -> str:
    """Return a text as it is up to ``limit`` characters, a longer one cut there and ended by three dots.

    >>> shortened("octocat", 7), shortened("octocats", 7)
    ('octocat', 'octocat...')
    """
    return text if len(text) <= limit else f"{text[:limit]}..."
