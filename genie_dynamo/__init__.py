"""Run PyTorch graphs on remote workers: `torch.compile(model, backend="genie")`.

Everything is imported on first use, so that a worker can start without the face and `import genie_dynamo` is quick.
The device `remote_accelerator` is made known to torch when torch is there (genie_dynamo/device/__init__.py).
"""
from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from genie_dynamo.device import arrange

__version__ = "0.1.0"

_WHERE = {
    "compile": "genie_dynamo.compiling",
    "init": "genie_dynamo.sessions",
    "shutdown": "genie_dynamo.sessions",
    "session": "genie_dynamo.sessions",
    "get_stats": "genie_dynamo.sessions",
    "reset_stats": "genie_dynamo.sessions",
    "invalidate": "genie_dynamo.sessions",
    "synchronize": "genie_dynamo.sessions",
    "set_log_level": "genie_dynamo.sessions",
    "analyze": "genie_dynamo.analysis",
    "capture": "genie_dynamo.capturing",
    "get_graph": "genie_dynamo.capturing",
    "annotate": "genie_dynamo.capturing",
    "execute": "genie_dynamo.capturing",
    "execute_local": "genie_dynamo.capturing",
    "run": "genie_dynamo.capturing",
    "RecordedGraph": "genie_dynamo.capturing",
    "RecordedPlan": "genie_dynamo.capturing",
    "SemanticGraph": "genie_dynamo.core.semantics",
    "Region": "genie_dynamo.core.semantics",
    "PhaseRule": "genie_dynamo.core.semantics",
    "Pattern": "genie_dynamo.passes.semantics.pattern",
    "Match": "genie_dynamo.passes.semantics.pattern",
    "NoMatch": "genie_dynamo.passes.semantics.pattern",
    "register_pattern": "genie_dynamo.passes.semantics.registry",
    "Session": "genie_dynamo.runtime.client.session",
    "Config": "genie_dynamo.core.config",
    "CostGraph": "genie_dynamo.core.cost_graph",
    "CostNode": "genie_dynamo.core.cost_graph",
    "CostEdge": "genie_dynamo.core.cost_graph",
    "Device": "genie_dynamo.core.cost_graph",
    "Placement": "genie_dynamo.core.placement",
    "explain": "genie_dynamo.explaining",
    "Explanation": "genie_dynamo.explanation",
    "place": "genie_dynamo.placing",
    "Scheduler": "genie_dynamo.placing",
    "CostModel": "genie_dynamo.passes.placement.interfaces",
    "PlacementStrategy": "genie_dynamo.passes.placement.interfaces",
}
_ERRORS = (
    "GenieError", "ConfigError", "CostError", "CostGraphError", "PlacementError", "PlanError", "UnsupportedGraphError",
    "SessionError", "SessionClosedError", "SessionExpiredError", "WorkerError", "WorkerUnreachableError",
    "WorkerLostError", "WorkerTimeoutError", "WorkerMemoryError", "WorkerBusyError", "RemoteExecutionError",
    "ProtocolError", "VersionMismatchError", "MessageLimitError", "StaleHandleError", "AuthenticationError",
)
_WHERE |= dict.fromkeys(_ERRORS, "genie_dynamo.core.errors")

__all__ = ["__version__", *_WHERE]

if TYPE_CHECKING:
    from genie_dynamo.analysis import analyze as analyze
    from genie_dynamo.capturing import RecordedGraph as RecordedGraph
    from genie_dynamo.capturing import RecordedPlan as RecordedPlan
    from genie_dynamo.capturing import annotate as annotate
    from genie_dynamo.capturing import capture as capture
    from genie_dynamo.capturing import execute as execute
    from genie_dynamo.capturing import execute_local as execute_local
    from genie_dynamo.capturing import get_graph as get_graph
    from genie_dynamo.capturing import run as run
    from genie_dynamo.compiling import compile as compile
    from genie_dynamo.core.config import Config as Config
    from genie_dynamo.core.cost_graph import CostEdge as CostEdge
    from genie_dynamo.core.cost_graph import CostGraph as CostGraph
    from genie_dynamo.core.cost_graph import CostNode as CostNode
    from genie_dynamo.core.cost_graph import Device as Device
    from genie_dynamo.core.errors import *  # noqa: F403
    from genie_dynamo.core.placement import Placement as Placement
    from genie_dynamo.core.semantics import PhaseRule as PhaseRule
    from genie_dynamo.core.semantics import Region as Region
    from genie_dynamo.core.semantics import SemanticGraph as SemanticGraph
    from genie_dynamo.explaining import explain as explain
    from genie_dynamo.explanation import Explanation as Explanation
    from genie_dynamo.passes.placement.interfaces import CostModel as CostModel
    from genie_dynamo.passes.placement.interfaces import PlacementStrategy as PlacementStrategy
    from genie_dynamo.passes.semantics.pattern import Match as Match
    from genie_dynamo.passes.semantics.pattern import NoMatch as NoMatch
    from genie_dynamo.passes.semantics.pattern import Pattern as Pattern
    from genie_dynamo.passes.semantics.registry import register_pattern as register_pattern
    from genie_dynamo.placing import Scheduler as Scheduler
    from genie_dynamo.placing import place as place
    from genie_dynamo.runtime.client.session import Session as Session
    from genie_dynamo.sessions import get_stats as get_stats
    from genie_dynamo.sessions import init as init
    from genie_dynamo.sessions import invalidate as invalidate
    from genie_dynamo.sessions import reset_stats as reset_stats
    from genie_dynamo.sessions import session as session
    from genie_dynamo.sessions import set_log_level as set_log_level
    from genie_dynamo.sessions import shutdown as shutdown
    from genie_dynamo.sessions import synchronize as synchronize


def __getattr__(name: str) -> Any:
    where = _WHERE.get(name)
    if where is None:
        raise AttributeError(f"module 'genie_dynamo' has no attribute {name!r}; public names: {', '.join(_WHERE)}")
    value = getattr(importlib.import_module(where), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


arrange()
