"""How far answers moved, and how sure that is."""
