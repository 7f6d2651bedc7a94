"""The edges: Spark, MongoDB, Kafka, Connect and MySQL. Single operations; no order of operations and no policy."""
