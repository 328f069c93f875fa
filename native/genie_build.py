"""The build backend: scikit-build-core, with the native extension where it can be built and without it elsewhere.

The extension is optional. Where CMake, a compiler, pybind11 or the build itself fails, the reason is printed and the
package is built as pure Python, whose lanes are those of the standard library. GENIE_REQUIRE_NATIVE=1 turns that into
an error.
"""
from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

from scikit_build_core import build as backend
from scikit_build_core.build import (
    build_sdist,
    get_requires_for_build_editable,
    get_requires_for_build_sdist,
    get_requires_for_build_wheel,
)

__all__ = ["build_editable", "build_sdist", "build_wheel", "get_requires_for_build_editable",
           "get_requires_for_build_sdist", "get_requires_for_build_wheel"]

Settings = dict[str, Any] | None


def build_wheel(wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None) -> str:
    """See PEP 517."""
    return _optional(backend.build_wheel, wheel_directory, config_settings, metadata_directory)


def build_editable(wheel_directory: str, config_settings: Settings = None,
                   metadata_directory: str | None = None) -> str:
    """See PEP 660."""
    return _optional(backend.build_editable, wheel_directory, config_settings, metadata_directory)


def _optional(build: Callable[..., str], wheel_directory: str, settings: Settings, metadata: str | None) -> str:
    required = os.environ.get("GENIE_REQUIRE_NATIVE", "").lower() in ("1", "true", "yes", "on")
    try:
        return build(wheel_directory, settings, metadata)
    except (Exception, SystemExit) as error:      # scikit-build-core exits where CMake or the compiler fails
        if required:
            raise
        why = str(error) if isinstance(error, Exception) else "CMake or the compiler failed, see above"
        print(f"genie-dynamo: the native extension is left out ({type(error).__name__}: {why}); what follows builds "
              "pure Python. GENIE_REQUIRE_NATIVE=1 makes this an error.", file=sys.stderr, flush=True)
    return build(wheel_directory, {**(settings or {}), "wheel.cmake": "false"}, metadata)
