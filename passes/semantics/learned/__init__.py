"""A small network for what the rules are unsure of."""
