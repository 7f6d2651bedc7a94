"""The stream of changes: decode, coalesce, apply, acknowledge; and the audit that compares its two ends."""
