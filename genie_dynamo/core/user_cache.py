"""Small files in the user's cache directory: private to the user, replaced whole, never trusted.

$XDG_CACHE_HOME/genie-dynamo, or ~/.cache/genie-dynamo. What others could have written is not read. A cache that cannot
be used is no error: reading gives None, writing False, and the reason is logged.
"""
from __future__ import annotations

import logging
import os
import stat
import tempfile
from pathlib import Path

log = logging.getLogger(__name__)


def cache_dir() -> Path:
    """Where the files are. It need not exist."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if Path(base).is_absolute() else Path.home() / ".cache") / "genie-dynamo"


def read(name: str, max_bytes: int) -> bytes | None:
    """The content of a file that this user alone can write to; None where there is none, or it is not one."""
    try:
        _check(os.lstat(cache_dir()), is_dir=True)
        descriptor = os.open(cache_dir() / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        log.warning("cache file %s is not read: %s", cache_dir() / name, error)
        return None
    with os.fdopen(descriptor, "rb") as file:
        try:
            _check(os.fstat(descriptor), is_dir=False)
        except OSError as error:
            log.warning("cache file %s is not read: %s", cache_dir() / name, error)
            return None
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        log.warning("cache file %s is not read: it has more than %d bytes", cache_dir() / name, max_bytes)
        return None
    return content


def write(name: str, content: bytes) -> bool:
    """Replace a file, in one step; whether it could be done."""
    directory = cache_dir()
    temporary = ""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check(directory.lstat(), is_dir=True)
        descriptor, temporary = tempfile.mkstemp(dir=directory)       # mode 0600
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        Path(temporary).replace(directory / name)
    except OSError as error:
        log.warning("cache file %s is not written: %s", directory / name, error)
        if temporary:
            Path(temporary).unlink(missing_ok=True)
        return False
    return True


def _check(info: os.stat_result, *, is_dir: bool) -> None:
    kind = stat.S_ISDIR if is_dir else stat.S_ISREG
    if not kind(info.st_mode):
        raise PermissionError("it is not a directory" if is_dir else "it is not a regular file")
    if info.st_uid != os.getuid():
        raise PermissionError(f"it belongs to user {info.st_uid}")
    if info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError("others can write to it")
