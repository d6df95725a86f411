"""What a log of requests says, without a model: which prompt tokens need not be computed, and what breaks prefixes."""
