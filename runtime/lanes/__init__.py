"""Payload channels between two ends. One contract (base.py), one file per kind of channel."""
