"""`genie COMMAND`: parse, call, and turn what went wrong into one line on stderr and a status.

Status: 0 when the command did what it says, 1 when it could not (or the demo's results differ), 2 for arguments
that do not parse, 130 after Ctrl-C.
"""
from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from genie_dynamo.cli import commands
from genie_dynamo.cli.parser import Parser
from genie_dynamo.core.errors import GenieError

INTERRUPTED = 130


def build_parser() -> Parser:
    """The parser of the whole command; every subcommand sets `run`, which takes the parsed arguments."""
    parser = Parser(
        prog="genie", description="Run PyTorch graphs on worker processes: torch.compile(model, backend=\"genie\").",
        example="genie demo\ngenie worker --bind tcp://127.0.0.1:5555\ngenie COMMAND --help")
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    for add in (commands.add_demo, commands.add_doctor, commands.add_explain, commands.add_worker,
                commands.add_workers, commands.add_lanes, commands.add_patterns, commands.add_keygen):
        add(parser, subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = build_parser()
    arguments = parser.parse(sys.argv[1:] if argv is None else argv)
    if arguments.version:
        return commands.print_version()
    if arguments.command is None:
        parser.error(f"a command is missing: one of {', '.join(parser.commands)}")
    return _run(arguments)


def _run(arguments: argparse.Namespace) -> int:
    from genie_dynamo.demo.errors import DemoError

    try:
        status: int = arguments.run(arguments)
    except (GenieError, DemoError) as exc:
        print(f"genie {arguments.command}: {exc}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"genie {arguments.command}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:   # the reader of our output (head, less) went away
        sys.stderr.close()    # the interpreter would complain about it once more at exit
        return 1
    return status
