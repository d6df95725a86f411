"""What fusion will give, from a sample."""
