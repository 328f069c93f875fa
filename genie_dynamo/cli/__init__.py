"""The `genie` command. Each subcommand imports what it needs when it runs, so that --help is instant."""
from __future__ import annotations

from genie_dynamo.cli.main import main

__all__ = ["main"]
