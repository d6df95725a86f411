"""Can text that is merely alike share pages? Ratio against KL, for equal tokens and for similar blocks."""
