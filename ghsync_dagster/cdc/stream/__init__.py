"""The stream: decode, coalesce, apply, acknowledge."""
