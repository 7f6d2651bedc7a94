"""What the compose stack runs alongside Dagster: its preparation, and the filter in front of the Docker API.

Belongs here: services of ``docker-compose.yml`` that are ours. Not here: the flows, and anything that a machine without
Docker needs.
"""
