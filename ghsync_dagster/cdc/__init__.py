"""The flow of changes: a stream that applies them, dead letters alongside it, and health, which watches and repairs."""
