"""Kafka: clients, topics, and how far a group is."""
