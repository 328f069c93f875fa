"""The cache directory: private, replaced whole, and nothing of strangers is read."""
from __future__ import annotations

import os
from pathlib import Path

import pytest

from genie_dynamo.core import user_cache


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "genie-dynamo"


def test_round_trip_with_private_modes(directory: Path) -> None:
    assert user_cache.read("a", 10) is None
    assert user_cache.write("a", b"one") and user_cache.write("a", b"two")
    assert user_cache.read("a", 10) == b"two"
    assert (directory.stat().st_mode & 0o777, (directory / "a").stat().st_mode & 0o777) == (0o700, 0o600)
    assert [p.name for p in directory.iterdir()] == ["a"]


def test_what_others_could_have_written_is_not_read(directory: Path) -> None:
    user_cache.write("a", b"x")
    (directory / "a").chmod(0o602)
    assert user_cache.read("a", 10) is None
    (directory / "a").chmod(0o600)
    directory.chmod(0o777)
    assert user_cache.read("a", 10) is None and not user_cache.write("a", b"y")


def test_links_and_pipes_are_not_followed(directory: Path, tmp_path: Path) -> None:
    user_cache.write("a", b"x")
    (tmp_path / "elsewhere").write_bytes(b"secret")
    (directory / "link").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(directory / "pipe")
    assert user_cache.read("link", 10) is None and user_cache.read("pipe", 10) is None
    (directory / "a").unlink()
    directory.rename(tmp_path / "real")
    directory.symlink_to(tmp_path / "real")
    assert not user_cache.write("a", b"y")


def test_a_long_file_is_not_read() -> None:
    user_cache.write("a", b"x" * 11)
    assert user_cache.read("a", 10) is None


def test_a_directory_that_cannot_be_made_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert not user_cache.write("a", b"x") and user_cache.read("a", 10) is None
