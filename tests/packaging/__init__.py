"""Tests of what installs, what sets up, and what the documents say."""
