"""A process beside a bench, which says on its first line where it can be reached and ends with its stdin."""
from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence


class Child:
    """`python -m MODULE ARGUMENTS... FOLDER`, with a folder of its own.

    where    what it has printed on its first line
    """

    def __init__(self, module: str, arguments: Sequence[str], folder: tempfile.TemporaryDirectory[str],
                 prefix: Sequence[str] = (), environment: Mapping[str, str] | None = None) -> None:
        self._folder = folder
        self._process = subprocess.Popen(
            [*prefix, sys.executable, "-m", module, *arguments, folder.name], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, env={**os.environ, **(environment or {})})
        assert self._process.stdout is not None
        self.where = self._process.stdout.readline().decode().strip()

    def cpu_s(self) -> float:
        """CPU seconds of all its threads."""
        from bench import procfs

        return procfs.cpu_s(self._process.pid)

    def close(self) -> None:
        """Let it end, and remove its folder."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(10)
        self._process.stdout.close()
        self._folder.cleanup()
