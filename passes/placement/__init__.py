"""Cost graph -> placement: three policies evaluated exactly, heuristics, and an exact solver where one is installed."""
