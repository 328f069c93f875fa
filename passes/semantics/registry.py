"""The patterns of this process: built-in, registered by users, found by entry points.

A pattern that raised or was slow is disabled until a pattern of its name with another version or another matcher is
registered, or the registry is reloaded.
"""
from __future__ import annotations

import importlib
import logging
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from importlib import metadata
from typing import Any

from genie_dynamo.core.errors import ConfigError
from genie_dynamo.passes.semantics.pattern import Matcher, Pattern

ENTRY_POINT_GROUP = "genie_patterns"
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class PatternStatus:
    """One row of `genie patterns`."""

    pattern: Pattern
    disabled: str = ""             # why, or ""


class Registry:
    """Patterns by name. Thread-safe; readers get a tuple that later changes do not touch."""

    def __init__(self, built_in: Callable[[], Iterable[Pattern]], *, group: str = ENTRY_POINT_GROUP) -> None:
        self._built_in, self._group = built_in, group
        self._lock = threading.RLock()
        self._patterns: dict[str, Pattern] = {}
        self._registered: dict[str, Pattern] = {}
        self._disabled: dict[str, str] = {}
        self._broken: dict[str, str] = {}
        self._loaded = False

    def register(self, pattern: Pattern, *, replace: bool = False) -> Pattern:
        """Add a pattern. It takes the place of one of its name that has another version or is disabled.

        Args:   replace: of any one of its name.

        Raises: ConfigError where another pattern has its name and version.
        """
        with self._lock:
            self._load()
            other = self._patterns.get(pattern.name)
            if (other is not None and other.version == pattern.version and not _same(pattern, other)
                    and not replace and pattern.name not in self._disabled):
                raise ConfigError(
                    f"another pattern {pattern.name!r}, version {pattern.version}, is there already ({other.origin}); "
                    "give yours another name or version, or register it with replace=True")
            self._registered[pattern.name] = self._patterns[pattern.name] = pattern
            self._disabled.pop(pattern.name, None)
        return pattern

    def unregister(self, name: str) -> None:
        """Take a registered pattern out; a built-in or installed one of its name comes back.

        Raises: ConfigError where no such pattern was registered.
        """
        with self._lock:
            if self._registered.pop(name, None) is None:
                raise ConfigError(f"no pattern {name!r} was registered; registered: {sorted(self._registered)}")
            self.reload()

    def reload(self) -> None:
        """Read entry points anew and enable everything again. Registered patterns stay."""
        with self._lock:
            self._loaded = False
            self._disabled.clear()
            importlib.invalidate_caches()
            self._load()

    def enabled(self) -> tuple[Pattern, ...]:
        """Patterns that run, highest priority first."""
        with self._lock:
            self._load()
            live = (p for p in self._patterns.values() if p.name not in self._disabled)
            return tuple(sorted(live, key=lambda p: (-p.priority, p.name)))

    def statuses(self) -> tuple[PatternStatus, ...]:
        """All patterns, with why some do not run."""
        with self._lock:
            self._load()
            return tuple(PatternStatus(pattern=p, disabled=self._disabled.get(p.name, ""))
                         for p in sorted(self._patterns.values(), key=lambda p: (-p.priority, p.name)))

    def broken_entry_points(self) -> dict[str, str]:
        """Entry points that could not be loaded: name -> reason."""
        with self._lock:
            self._load()
            return dict(self._broken)

    def disable(self, pattern: Pattern, reason: str) -> None:
        """Stop using a pattern: said once, kept for `genie patterns`."""
        with self._lock:
            if self._patterns.get(pattern.name) is not pattern or pattern.name in self._disabled:
                return
            self._disabled[pattern.name] = reason
        log.warning("pattern %s %s is disabled: %s", pattern.name, pattern.version, reason)

    def _load(self) -> None:
        if self._loaded:
            return
        self._loaded = True
        self._patterns = {p.name: replace(p, origin="built-in") for p in self._built_in()}
        self._broken = {}
        for entry in metadata.entry_points(group=self._group):
            self._load_entry(entry)
        self._patterns |= self._registered

    def _load_entry(self, entry: Any) -> None:
        """An entry point names a Pattern, or a function without arguments that returns one or several."""
        try:
            found = entry.load()
            found = found if isinstance(found, Pattern) else found()
            patterns = (found,) if isinstance(found, Pattern) else tuple(found)
            wrong = [p for p in patterns if not isinstance(p, Pattern)]
            if wrong:
                raise ConfigError(f"{wrong[0]!r:.80} is not a Pattern")
        except Exception as exc:     # another distribution's code: whatever it raises must not stop ours
            self._broken[entry.name] = f"{type(exc).__name__}: {exc}"
            log.warning("entry point %s of group %s is ignored: %s", entry.name, self._group, self._broken[entry.name])
            return
        origin = entry.dist.name if entry.dist is not None else "entry point"
        self._patterns |= {p.name: replace(p, origin=origin) for p in patterns}


def _same(one: Pattern, other: Pattern) -> bool:
    return replace(one, origin="") == replace(other, origin="")


def _built_in() -> tuple[Pattern, ...]:
    from genie_dynamo.passes.semantics.patterns import BUILT_IN

    return BUILT_IN


REGISTRY = Registry(_built_in)


def register_pattern(pattern: Pattern | None = None, *, name: str = "", anchors: tuple[str, ...] = (),
                     kinds: tuple[str, ...] = (), version: str = "1", priority: int = 50,
                     annotations: dict[str, Any] | None = None, replace: bool = False) -> Any:
    """Register a pattern, or decorate a matcher to become one.

    Args:    pattern: a finished one; or leave it out and give the fields of `Pattern` to decorate a matcher.
             replace: take the place of another pattern with this name and version, as a cell that is run again does.
    Returns: the pattern; as a decorator, the matcher.
    Raises:  ConfigError for fields that are missing or wrong, and for a name and version that another pattern has.
    """
    if pattern is not None:
        if not isinstance(pattern, Pattern):
            raise ConfigError(f"register_pattern takes a Pattern or keywords, got {pattern!r:.80}; a decorator is "
                              "called: @register_pattern(name=..., anchors=..., kinds=...)")
        return REGISTRY.register(pattern, replace=replace)

    def decorate(matcher: Matcher) -> Matcher:
        REGISTRY.register(Pattern(
            name=name or getattr(matcher, "__name__", ""), matcher=matcher, anchors=anchors, kinds=kinds,
            version=version, priority=priority, annotations=annotations or {}), replace=replace)
        return matcher

    return decorate
