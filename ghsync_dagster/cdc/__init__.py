"""The flow of changes: a stream that applies them, dead letters beside it, and health, which watches and repairs."""
