"""The batch flow: read -> flatten -> load -> verify. Takes its stores as arguments; knows no Dagster."""
