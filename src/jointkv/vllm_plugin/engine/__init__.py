"""All that knows vLLM's insides."""
