"""The serving benchmark: real servers, vLLM's own load generator, arms in turns, one JSON that a report is made of."""
