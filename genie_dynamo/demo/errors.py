"""What can go wrong with the demo itself."""
from __future__ import annotations


class DemoError(RuntimeError):
    """The demo cannot run here; the message says what is missing and the next step."""
