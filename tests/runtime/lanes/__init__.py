"""Lanes between two ends: what each promises, what hostile peers may do, and how one is chosen."""
