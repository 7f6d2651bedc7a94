"""Models of the protocols, and what walks all interleavings of their steps."""
