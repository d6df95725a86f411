"""Batches of requests held in memory after a prefill."""
