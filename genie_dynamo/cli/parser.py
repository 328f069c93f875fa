"""argparse, with three habits: an example in every --help, no abbreviations, and the nearest right name for
whatever does not parse."""
from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

USAGE_ERROR = 2


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors say what would have been right.

    Args: example: one command line that works, shown at the end of --help.
    """

    def __init__(self, *args: Any, example: str = "", **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        if example:
            kwargs["epilog"] = "example:\n" + "\n".join(f"  {line}" for line in example.splitlines())
        super().__init__(*args, **kwargs)
        self.commands: dict[str, Parser] = {}
        self._words: Sequence[str] = ()

    def add_command(self, subparsers: Any, name: str, *, help: str, example: str) -> Parser:
        """One subcommand; `help` is its line in the list and its description."""
        command: Parser = subparsers.add_parser(name, help=help, description=help, example=example)
        self.commands[name] = command
        return command

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """The arguments. Exits with status 2 and a hint for what it does not know."""
        for parser in (self, *self.commands.values()):
            parser._words = argv
        arguments, unknown = self.parse_known_args(argv)
        if unknown:
            command = self.commands.get(getattr(arguments, "command", None) or "", self)
            command.error(f"unrecognized arguments: {' '.join(unknown)}{command.hint_for_options(unknown)}")
        return arguments

    def error(self, message: str) -> NoReturn:
        """Usage, the message and, for a wrong choice, the nearest right one, on stderr; status 2."""
        wrong = re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message)
        if wrong:
            choices = [word.strip(" '") for word in wrong.group(2).split(",")]
            message += _did_you_mean(wrong.group(1), choices)
        elif "required" in message:      # it may be there, misspelt
            message += self.hint_for_options(word for word in self._words if not self._knows(word))
        self.print_usage(sys.stderr)
        self.exit(USAGE_ERROR, f"{self.prog}: error: {message}\nSee {self.prog} --help\n")

    def _knows(self, word: str) -> bool:
        return any(word.split("=")[0] in action.option_strings for action in self._actions)

    def hint_for_options(self, unknown: Iterable[str]) -> str:
        """' (did you mean --device?)' for the first option that resembles one of this parser's."""
        known = [option for action in self._actions for option in action.option_strings]
        for word in unknown:
            if word.startswith("-"):
                return _did_you_mean(word.split("=")[0], known)
        return ""


def _did_you_mean(word: str, choices: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    return f" (did you mean {near[0]}?)" if near else ""
