"""From a sample of traffic and a target to a profile."""
