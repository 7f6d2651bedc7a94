"""What watches the stream and heals it: audit, checks, metrics, the connector, and requests for repair."""
