"""Attention that reads shared pages once, in vLLM."""
