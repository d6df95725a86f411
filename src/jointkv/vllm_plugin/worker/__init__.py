"""The workers' side: it follows and measures."""
