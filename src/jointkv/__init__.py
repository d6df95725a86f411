"""Joint encoding of KV-cache blocks (Kampeas and Haleva, arXiv 2601.03067)."""

__version__ = "0.1.0"
