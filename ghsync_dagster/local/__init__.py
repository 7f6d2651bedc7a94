"""Real servers on this machine without Docker: MongoDB, MySQL, Kafka, Connect. The flows do not know that it exists."""
