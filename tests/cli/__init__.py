"""Tests of the genie command and the demo."""
