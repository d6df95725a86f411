"""The scheduler's side: it asks, decides and shares."""
