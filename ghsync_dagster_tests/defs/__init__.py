"""What Dagster shows and runs, without servers."""
