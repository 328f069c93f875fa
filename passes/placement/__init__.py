"""Cost graph -> placement: exact evaluation of three policies, heuristics, and an exact solver where it is installed."""
