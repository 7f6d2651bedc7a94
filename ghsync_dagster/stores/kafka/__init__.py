"""Kafka: clients, topics, and the lag of a group."""
