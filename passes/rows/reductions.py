"""Reductions: over other dims they leave rows alone; over rows, parts of some can be put together again."""
from __future__ import annotations

from genie_dynamo.passes.rows.call import Call, MixesRows, Parts, State, Together, wrap
from genie_dynamo.passes.rows.elementwise import aligned
from genie_dynamo.passes.rows.registry import rule

_TOGETHER: dict[str, Together] = {
    "sum": "sum", "mean": "mean", "amax": "max", "amin": "min", "max": "max", "min": "min", "any": "any", "all": "all"}


@rule("sum", "mean", "amax", "amin", "any", "all", "prod", "var", "std", "var_mean", "linalg_vector_norm", "norm",
      "logsumexp")
def reduce(call: Call) -> Parts:
    """With equal parts a mean is the mean of the parts' means."""
    source = call.leaf("self") if "self" in call else call.leaves[0]
    assert source.dim is not None
    asked = call.get("dim")
    if asked is None or asked == []:
        over = set(range(source.ndim))
    else:
        over = {wrap(d, source.ndim) for d in (asked if isinstance(asked, list) else [asked])}
    kind = call.name.removeprefix("aten::")
    state: State
    if source.dim in over:
        if kind not in _TOGETHER:
            raise MixesRows(f"{call.node.name} ({kind}) reduces over rows, and parts of it cannot be put together")
        state = _TOGETHER[kind]
    else:
        state = _left(call, source.dim, over)
    values = call.out if isinstance(call.out, list | tuple) else (call.out,)
    return Parts(tuple(state for _ in values))


def _left(call: Call, dim: int, over: set[int]) -> int:
    return dim if call["keepdim"] else dim - sum(d < dim for d in over)


@rule("max", "min", "argmax", "argmin", "mode", "median", "kthvalue")
def pick(call: Call) -> Parts:
    """With a dim: values and where they were, or only where."""
    source = call.leaf("self")
    assert source.dim is not None
    asked = call.get("dim")
    kind = call.name.removeprefix("aten::")
    if asked is None:
        if kind not in _TOGETHER:
            raise MixesRows(f"{call.node.name} looks for a place among all rows")
        return Parts((_TOGETHER[kind],))
    dim = wrap(asked, source.ndim)
    if dim == source.dim:
        raise MixesRows(f"{call.node.name} looks for a place among rows")
    values = call.out if isinstance(call.out, list | tuple) else (call.out,)
    return Parts(tuple(_left(call, source.dim, {dim}) for _ in values))


@rule("_softmax", "_log_softmax", "cumsum", "cumprod", "logcumsumexp", "topk", "sort", "glu", "_safe_softmax")
def along(call: Call) -> Parts:
    """Works along one dim, whose size may change; the others stay."""
    source = call.leaf("self")
    if wrap(call["dim"], source.ndim) == source.dim:
        raise MixesRows(f"{call.node.name} ({call.name.removeprefix('aten::')}) works along rows")
    values = call.out if isinstance(call.out, list | tuple) else (call.out,)
    return Parts(tuple(source.dim for _ in values))


@rule("_softmax_backward_data", "_log_softmax_backward_data", "glu_backward")
def along_backward(call: Call) -> Parts:
    rows = aligned(call, call.leaves, call.leaves[-1].ndim)
    if wrap(call["dim"], call.leaves[-1].ndim) == rows:
        raise MixesRows(f"{call.node.name} works along rows")
    return Parts((rows,))
