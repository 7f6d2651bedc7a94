"""MongoDB: the users and the books that the platform keeps of them."""
