"""Sessions, protocol, workers, residency and lanes. Never imports the passes or the face."""
