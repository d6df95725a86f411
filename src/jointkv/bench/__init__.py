"""A/B of a served engine: the same requests by real servers with and without fusion, in turns."""
