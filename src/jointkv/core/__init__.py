"""Pages, tables and plans: what every other room stands on. Knows torch and nothing of models or engines."""
