"""The demo behind `genie demo` and the first notebook: real work, done locally and on workers, compared."""
from __future__ import annotations

from genie_dynamo.demo.errors import DemoError
from genie_dynamo.demo.main import DemoOptions, run_demo

__all__ = ["DemoError", "DemoOptions", "run_demo"]
