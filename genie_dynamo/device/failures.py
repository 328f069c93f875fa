"""Recorded nodes whose values cannot be had: which, why, and what goes with them."""
from __future__ import annotations

import re
from collections.abc import Callable

from genie_dynamo.core.errors import GenieError
from genie_dynamo.device.nodes import Failed, Node, num_tensors
from genie_dynamo.device.structure import Recording, build
from genie_dynamo.runtime.client.resident import Resident
from genie_dynamo.runtime.client.session import Session
from genie_dynamo.runtime.client.workers import WorkerLink


def blamed(recording: Recording, error: BaseException) -> set[Node]:
    """The node that the worker's error names, failed now; all of them where it names none."""
    notes = " ".join([str(error), *getattr(error, "__notes__", ())])
    found = re.search(r"in node (\w+) = ", notes)
    names = [node.name for node in build(recording).graph.nodes if node.op == "call_function"]
    broken = {recording.nodes[names.index(found[1])]} if found and found[1] in names else {*recording.nodes}
    for node in broken:
        node.value = Failed(error)
    return broken


def failed_leaves(recording: Recording, session: Session, link: WorkerLink) -> set[Node]:
    """The leaves that cannot be had; those whose worker is gone have failed from now on."""
    for leaf in recording.leaves:
        error = gone(leaf, session, link)
        if error is not None:
            leaf.value = Failed(error)
    return {leaf for leaf in recording.leaves if type(leaf.value) is Failed}


def spread_failure(recording: Recording, broken: set[Node]) -> Callable[[Node | None], Node | None]:
    """Fail what hangs on broken nodes. What only draws after one of them draws all the same.

    Returns: for a random node, it or the last one before it that has not failed.
    """
    followed: dict[Node, Node] = {}

    def sound(node: Node | None) -> Node | None:
        while node is not None and node in broken:
            node = followed.get(node)
        return node

    for node in recording.nodes:
        before = follows(node)
        if before is not None:
            followed[node] = before
            last = sound(before)
            node.inputs = (*node.inputs[:-1], *(() if last is None else (last,)))
        causes = [source for source in node.inputs if source in broken]
        if causes:
            broken.add(node)
            node.value = Failed(causes[0].value.error)
        if node in broken:
            node.inputs = ()
    return sound


def follows(node: Node) -> Node | None:
    """The random node that a random node only has to follow: its last input, where its op does not take so many."""
    call = node.call
    if call is None or not call.random or len(node.inputs) <= num_tensors((call.args, call.kwargs)):
        return None
    return node.inputs[-1]


def gone(node: Node, session: Session, link: WorkerLink) -> GenieError | None:
    """Why a resident value can no longer be had; None where it can."""
    try:
        if type(node.value) is Resident:
            node.value.check(session, link)
    except GenieError as error:
        return error
    return None


def raise_if_failed(node: Node) -> None:
    """Raises: why the node's value cannot be had."""
    if type(node.value) is Failed:
        raise node.value.error
