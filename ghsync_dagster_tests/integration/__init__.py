"""What holds on real servers, which the tests start."""
