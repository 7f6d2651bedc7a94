"""What the benchmarks compare ghsync with. Nothing here imports ghsync, as its scripts run by their path."""
