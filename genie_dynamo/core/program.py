"""A worker's share of a plan: the fragments it runs and where each value comes from and goes to.

Values are numbered per plan. A program is sent once (messages.Load) and run many times (messages.Run).
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from genie_dynamo.core.errors import ProtocolError
from genie_dynamo.core.plan import RNG_STATE, Fragment, Plan, rng_after

Offers = tuple[tuple[str, int, str], ...]
"""Native lanes that a worker offers: (name, version, address), best first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FragmentProgram:
    """One fragment as a worker sees it. `spec` is an encoded core.fragment.GraphSpec."""

    fragment_id: int
    spec: bytes
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    rng: tuple[int, int] | None       # (value id of the state before, value id of the state after)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerProgram:
    """All that one worker does for one plan."""

    program_id: int
    fragments: tuple[FragmentProgram, ...]
    inputs: tuple[int, ...]                          # value ids the client supplies in each Run, in order
    receives: tuple[int, ...]                        # value ids that other workers push here
    sends: tuple[tuple[int, str, str, Offers], ...]  # (value id, peer address, its key or "", its lanes) to push
    returns: tuple[int, ...]                         # value ids that go back to the client
    keeps: tuple[int, ...]                           # value ids that stay here under a handle
    state: tuple[int, ...] = ()                      # value ids that also stay here where a Run gives them handles
    aliases: tuple[tuple[int, ...], ...] = ()        # groups of `returns` that share memory
    input_views: tuple[tuple[int, int], ...] = ()    # (one of `returns`, one of `inputs` that it is a view of)
    compiler: str = "flat"                           # "flat" | "inductor" | "auto"

    def to_wire(self) -> tuple[Any, ...]:
        fragments = tuple((f.fragment_id, f.spec, f.inputs, f.outputs, f.rng) for f in self.fragments)
        return (self.program_id, fragments, self.inputs, self.receives, self.sends, self.returns, self.keeps,
                self.state, self.aliases, self.input_views, self.compiler)

    @classmethod
    def from_wire(cls, data: Any) -> WorkerProgram:
        """Raises: ProtocolError where the array is not a program."""
        try:
            program_id, fragments, inputs, receives, sends, returns, keeps, state, aliases, views, compiler = data
            built = tuple(
                FragmentProgram(fragment_id=_int(i), spec=_bytes(spec), inputs=_ints(a), outputs=_ints(b),
                                rng=None if rng is None else (_int(rng[0]), _int(rng[1])))
                for i, spec, a, b, rng in fragments
            )
            if compiler not in ("flat", "inductor", "auto"):
                raise ValueError(f"unknown compiler {compiler!r:.40}")
            return cls(
                program_id=_int(program_id), fragments=built, inputs=_ints(inputs), receives=_ints(receives),
                sends=tuple((_int(v), str(address), str(key), _offers(lanes)) for v, address, key, lanes in sends),
                returns=_ints(returns), keeps=_ints(keeps), state=_ints(state),
                aliases=tuple(_ints(group) for group in aliases),
                input_views=tuple((_int(v), _int(source)) for v, source in views), compiler=compiler,
            )
        except (TypeError, ValueError, IndexError) as exc:
            raise ProtocolError(f"not a program: {exc}") from exc


def _int(value: Any) -> int:
    if type(value) is not int:
        raise TypeError(f"expected an integer, got {value!r:.40}")
    return value


def read_offers(lanes: Any) -> Offers:
    """Raises: ProtocolError where these are no native lanes."""
    try:
        return _offers(lanes)
    except (TypeError, ValueError) as exc:
        raise ProtocolError(f"not what a worker offers: {exc}") from exc


def _offers(lanes: Any) -> Offers:
    return tuple((str(name), _int(version), str(address)) for name, version, address in lanes)


def _bytes(value: Any) -> bytes:
    if type(value) is not bytes:
        raise TypeError(f"expected bytes, got {type(value).__name__}")
    return value


def _ints(values: Any) -> tuple[int, ...]:
    return tuple(_int(v) for v in values)


def value_ids(plan: Plan) -> dict[str, int]:
    """A number for every value that crosses a fragment's border."""
    names = dict.fromkeys((*plan.inputs, RNG_STATE))
    for fragment in plan.fragments:
        names.update(dict.fromkeys(fragment.outputs))
        if fragment.rng_in:
            names[rng_after(fragment.fragment_id)] = None
    return {name: index for index, name in enumerate(names)}


def static_updates(plan: Plan, made: set[str]) -> list[tuple[int, str]]:
    """(input position, value) of the parameters and buffers whose new content is among `made` and kept in every call.

    Values of `plan.state` are kept as such.
    """
    static = set(plan.static_inputs)
    return [(index, name) for index, name in plan.mutations
            if index in static and name in made and name not in plan.state]


def _wants(fragment: Fragment) -> tuple[str, ...]:
    return (*fragment.inputs, fragment.rng_in) if fragment.rng_in else fragment.inputs


def _makes(fragment: Fragment) -> tuple[str, ...]:
    return (*fragment.outputs, rng_after(fragment.fragment_id)) if fragment.rng_in else fragment.outputs


def worker_programs(
    plan: Plan,
    specs: dict[int, bytes],
    *,
    program_id: int,
    peers: tuple[tuple[str, str, Offers], ...],
    compiler: str = "flat",
) -> dict[int, WorkerProgram]:
    """Each worker's program.

    Args:    specs: fragment id -> encoded GraphSpec.  peers: (address, key, lanes) per worker of the plan.
    Returns: worker index -> program, for the workers that have a fragment.
    """
    ids = value_ids(plan)
    programs: dict[int, WorkerProgram] = {}
    kept: set[str] = set()
    for worker in sorted({f.worker for f in plan.fragments}):
        mine = [f for f in plan.fragments if f.worker == worker]
        made = {v for f in mine for v in _makes(f)}
        wanted = dict.fromkeys(v for f in mine for v in _wants(f) if v not in made)
        from_client = [v for v in wanted if v in plan.inputs or v == RNG_STATE]
        sends = [
            (ids[v], *peers[other])
            for other in sorted({f.worker for f in plan.fragments} - {worker})
            for v in dict.fromkeys(v for f in plan.fragments if f.worker == other for v in _wants(f))
            if v in made
        ]
        # An input may be saved for the backward too: the first worker that gets it keeps it.
        here = made | {*from_client}
        keeps = [v for v in plan.saved_values() if v in here - kept]
        kept.update(keeps)
        # A value may be both saved and the new content of a buffer: it is kept under two handles then.
        keeps += [name for _, name in static_updates(plan, here)]
        programs[worker] = WorkerProgram(
            program_id=program_id,
            fragments=tuple(
                FragmentProgram(
                    fragment_id=f.fragment_id, spec=specs[f.fragment_id],
                    inputs=tuple(ids[v] for v in f.inputs), outputs=tuple(ids[v] for v in f.outputs),
                    rng=(ids[f.rng_in], ids[rng_after(f.fragment_id)]) if f.rng_in else None,
                )
                for f in mine
            ),
            inputs=tuple(ids[v] for v in from_client),
            receives=tuple(ids[v] for v in wanted if v not in from_client),
            sends=tuple(sends),
            returns=tuple(ids[v] for v in plan.returned_values() if v in made),
            keeps=tuple(ids[v] for v in keeps),
            state=tuple(ids[v] for v in plan.state if v in made),
            aliases=tuple(tuple(ids[v] for v in group) for group in plan.aliases if group[0] in made),
            input_views=tuple((ids[v], ids[source]) for v, source in plan.input_views
                              if v in made and source in from_client),
            compiler=compiler,
        )
    return programs
