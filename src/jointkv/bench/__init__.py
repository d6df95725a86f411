"""A/B of a served engine: the same requests with and without fusion, each run in a process of its own."""
