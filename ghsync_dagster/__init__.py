"""ghsync: keeps the MongoDB collection ``new_data.Users`` right, from files of GitHub events."""
