"""The worker's protocol, one failure order after another, without a network."""
from __future__ import annotations

import hashlib
from typing import Any

import pytest

from genie_dynamo.core import messages as m
from genie_dynamo.core.errors import ProtocolError
from genie_dynamo.core.program import FragmentProgram, WorkerProgram
from genie_dynamo.runtime.worker.events import (
    Abandon,
    Command,
    Execute,
    Failed,
    Finished,
    Left,
    Measure,
    Received,
    Reply,
    Tick,
)
from genie_dynamo.runtime.worker.records import RunRecord
from genie_dynamo.runtime.worker.state import UPLOAD_SILENCE_S, WorkerState

TOKEN, OTHER = b"s" * 16, b"t" * 16


class Blob:
    """Stands for a tensor: weakly referable, with content."""

    def __init__(self, content: bytes) -> None:
        self.content = content


class Pieces:
    """Stands for an Assembly (worker/assembly.py): pieces `(bytes, size of the whole)`."""

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self.parts: dict[int, bytes] = {}

    def add(self, wire: Any, offset: int, frames: Any, *, digest: bool) -> None:
        if offset + len(wire[0]) > self.size_bytes:
            raise ProtocolError(f"a piece at {offset} of {self.size_bytes}")
        self.parts[offset] = wire[0]

    @property
    def whole(self) -> bool:
        return sum(map(len, self.parts.values())) == self.size_bytes

    @property
    def sha256(self) -> bytes:
        return hashlib.sha256(self.wire(None)[0][0]).digest()

    def wire(self, wire: Any) -> tuple[tuple[bytes], tuple[()]]:
        return (b"".join(part for _, part in sorted(self.parts.items())),), ()


class Tools:
    small = False

    def land(self, wire: Any, frames: Any) -> Blob:
        return Blob(wire[0])

    def own(self, tensor: Blob) -> Blob:
        return tensor

    def announced_bytes(self, wire: Any) -> int:
        return int(wire[1])

    def assemble(self, wire: Any) -> Pieces:
        return Pieces(int(wire[1]))

    def cut(self, tensor: Blob) -> list[tuple[Any, Any, int]]:
        whole = len(tensor.content)
        return [((tensor.content[at:at + 2], whole), b"", at) for at in range(0, whole, 2)] if whole > 8 else []

    def load(self, program: WorkerProgram) -> str:
        return f"loaded {program.program_id}"

    def is_small(self, loaded: str) -> bool:
        return self.small

    def run_now(self, loaded: str, env: dict[int, Any], resident_bytes: int,
                connection: bytes) -> tuple[list[Any], float]:
        if env[0].content == b"bad":
            raise ValueError("no such value")
        return [Blob(env[0].content + b"!")], 0.5

    def content_bytes(self, tensor: Blob) -> bytes:
        return tensor.content

    def content_size(self, tensor: Blob) -> int:
        return len(tensor.content)

    def size_bytes(self, tensor: Any) -> int:
        return len(tensor.content)

    def form(self, value: Any) -> Any:
        return ("form", len(value.content))

    def stage(self, value: Any, frames: list[Any]) -> Any:
        return (m.INLINE, (value.content,))

    def works_for(self, work: Any) -> None:
        """It copies nothing."""

    def lane_counters(self, connection: bytes) -> dict[str, int]:
        return {}

    def lane_memory(self, connection: bytes) -> dict[str, Any]:
        return {}

    def facts(self) -> dict[str, Any]:
        return {"device": "cpu"}


class Worker:
    """A state machine and a clock, with shorthands."""

    def __init__(self) -> None:
        self.tools = Tools()
        self.state = WorkerState(incarnation="i1", heartbeat_address="hb", toolbox=self.tools)
        self.now_s = 0.0

    def send(self, message: m.Message, connection: bytes = b"c") -> list[Command]:
        return self.state.handle(Received(connection, message, (), self.now_s))

    def hello(self, token: bytes = TOKEN, connection: bytes = b"c", lease_s: float = 10.0) -> list[Command]:
        return self.send(m.Hello(m.PROTOCOL_VERSION, token, lease_s, {}), connection)

    def load(self, **changes: Any) -> list[Command]:
        fields: dict[str, Any] = {
            "program_id": 1,
            "fragments": (FragmentProgram(fragment_id=0, spec=b"", inputs=(0,), outputs=(1,), rng=None),),
            "inputs": (0,), "receives": (), "sends": (), "returns": (1,), "keeps": (),
        }
        return self.send(m.Load(1, WorkerProgram(**{**fields, **changes}).to_wire()))

    def run(self, *arguments: Any, call_id: int = 9, **fields: Any) -> list[Command]:
        return self.send(m.Run(5, 1, call_id, arguments, fields.get("keeps", ()), fields.get("incoming", ()),
                               fields.get("frees", ())))


@pytest.fixture
def worker() -> Worker:
    made = Worker()
    made.hello()
    made.load()
    return made


def inline(content: bytes) -> Any:
    return (m.INLINE, (content,))


def failure_of(commands: list[Command]) -> m.Failure:
    (reply,) = [c for c in commands if isinstance(c, Reply)]
    assert isinstance(reply.message, m.Failure), reply
    return reply.message


def run_of(commands: list[Command]) -> RunRecord:
    (execute,) = commands
    assert isinstance(execute, Execute)
    return execute.run


def test_a_run_with_inline_arguments_executes_and_answers(worker: Worker) -> None:
    run = run_of(worker.run(inline(b"x")))
    assert run.env[0].content == b"x"
    (reply,) = worker.state.handle(Finished(run, ((0, Blob(b"y")),), (), 0.0))
    assert isinstance(reply, Reply) and isinstance(reply.message, m.Result)
    assert reply.message.values == ((0, (m.INLINE, (b"y",))),)


def small_worker() -> Worker:
    made = Worker()
    made.tools.small = True
    made.hello()
    made.load()
    return made


def test_a_run_of_a_small_program_is_answered_at_once() -> None:
    (reply,) = small_worker().run(inline(b"x"))
    assert isinstance(reply, Reply) and isinstance(reply.message, m.Result)
    assert reply.message.values == ((0, (m.INLINE, (b"x!",))),) and reply.message.compute_s == 0.5


def test_a_small_program_that_raises_tells_so_and_leaves_nothing_behind() -> None:
    worker = small_worker()
    assert failure_of(worker.run(inline(b"bad"))).facts["exception"] == "ValueError"
    assert not worker.state.sessions[TOKEN].runs


def test_a_small_program_on_a_tensor_still_to_come_takes_the_general_way() -> None:
    worker = small_worker()
    run = run_of(worker.run((m.RESIDENT, 3, 1), incoming=((3, 1),)))
    assert run.pending == {(3, 1): [0]}


def test_a_cancellation_that_overtakes_its_run_still_counts() -> None:
    worker = small_worker()
    assert worker.send(m.Cancel(9)) == []
    assert worker.run(inline(b"x"), call_id=9) == []


def test_a_stream_belongs_to_a_connection_of_its_session() -> None:
    worker = Worker()
    stream = b"\0stream1"
    early = m.Hello(m.PROTOCOL_VERSION, TOKEN, 10.0, {}, b"c")
    assert failure_of(worker.send(early, stream)).kind == "ProtocolError"
    worker.hello()
    worker.hello(token=OTHER, connection=b"d")
    assert failure_of(worker.send(early._replace(session=OTHER), stream)).kind == "ProtocolError"
    (reply,) = worker.send(early, stream)
    assert isinstance(reply, Reply) and isinstance(reply.message, m.Welcome)
    assert worker.state.routes == {stream: b"c"}
    assert worker.state.handle(Left(stream)) == []
    assert worker.state.routes == {} and worker.state.sessions[TOKEN].connections == {b"c"}
    assert failure_of(worker.send(m.Ping(), stream)).kind == "StaleHandleError"


def test_no_session_begins_over_a_stream_or_lane_whose_ends_show_no_keys() -> None:
    worker = Worker()
    for name in (b"\0lane" + bytes(8), b"\0stream" + bytes(8)):
        assert failure_of(worker.hello(connection=name)).kind == "ProtocolError"
    assert not worker.state.sessions
    worker.hello(connection=b"\0zmq1")


def test_a_message_before_hello_is_told_that_the_connection_is_unknown() -> None:
    assert failure_of(Worker().run(1)).kind == "StaleHandleError"


def test_another_protocol_version_is_named_on_both_sides() -> None:
    told = failure_of(Worker().send(m.Hello(99, TOKEN, 1.0, {})))
    assert told.kind == "VersionMismatchError" and "99" in told.message and str(m.PROTOCOL_VERSION) in told.message


def test_a_wrong_number_of_arguments_is_refused_and_the_worker_lives_on(worker: Worker) -> None:
    assert failure_of(worker.run(1, 2)).kind == "ProtocolError"
    assert run_of(worker.run(3)).env[0] == 3


@pytest.mark.parametrize("argument", ["text", (99, 7, 7), (m.MOVED, "7", 7), (), (m.RESIDENT, 1), b"raw", (m.INLINE,)])
def test_what_is_not_an_argument_is_a_protocol_error(worker: Worker, argument: Any) -> None:
    assert failure_of(worker.run(argument)).kind == "ProtocolError"


def test_a_resident_tensor_is_found_by_id_and_epoch_only(worker: Worker) -> None:
    worker.send(m.Put(((4, 2, (b"v2",), None),)))
    assert run_of(worker.run((m.RESIDENT, 4, 2))).env[0].content == b"v2"
    assert failure_of(worker.run((m.RESIDENT, 4, 1))).kind == "StaleHandleError"
    assert failure_of(worker.run((m.RESIDENT, 4, 3))).kind == "StaleHandleError"


def test_another_session_does_not_see_the_tensor(worker: Worker) -> None:
    worker.send(m.Put(((4, 0, (b"mine",), None),)))
    worker.hello(OTHER, b"d")
    assert failure_of(worker.send(m.Fetch(3, 4, 0), b"d")).kind == "StaleHandleError"


def test_a_run_waits_for_a_put_that_was_announced(worker: Worker) -> None:
    run = run_of(worker.run((m.RESIDENT, 4, 1), incoming=((4, 1),)))
    assert 0 not in run.env
    again = run_of(worker.send(m.Put(((4, 1, (b"late",), None),))))
    assert again is run and run.env[0].content == b"late" and not run.pending


def piece(content: bytes, offset: int, digest: bytes | None = None, tensor_id: int = 4) -> m.Piece:
    return m.Piece(b"", tensor_id, 1, (content[offset:offset + 4], len(content)), digest, offset)


def test_another_clients_run_is_answered_in_the_middle_of_an_upload(worker: Worker) -> None:
    waiting = run_of(worker.run((m.RESIDENT, 4, 1), incoming=((4, 1),)))
    assert worker.send(piece(b"large tensor", 0)) == []
    worker.hello(OTHER, b"d")
    worker.state.sessions[OTHER].programs.update(worker.state.sessions[TOKEN].programs)
    between = run_of(worker.send(m.Run(6, 1, 10, (inline(b"step"),), (), (), ()), b"d"))
    (reply,) = worker.state.handle(Finished(between, (), (), 0.0))
    assert isinstance(reply, Reply) and reply.connection == b"d" and 0 not in waiting.env
    assert worker.send(piece(b"large tensor", 4)) == []
    assert run_of(worker.send(piece(b"large tensor", 8))) is waiting and waiting.env[0].content == b"large tensor"
    assert not worker.state.sessions[TOKEN].arriving


def test_pieces_with_a_wrong_digest_fail_the_run_that_waits(worker: Worker) -> None:
    worker.run((m.RESIDENT, 4, 1), incoming=((4, 1),))
    digest = hashlib.sha256(b"original").digest()
    assert worker.send(piece(b"tampered", 0, digest)) == []
    assert failure_of(worker.send(piece(b"tampered", 4, digest))).request == 5


@pytest.mark.parametrize("end", ["given up", "freed", "lost"])
def test_the_rest_of_an_upload_that_has_ended_is_dropped(worker: Worker, end: str) -> None:
    lane, sent = b"\0lane1234", piece(b"large tensor", 0)
    worker.send(m.Hello(m.PROTOCOL_VERSION, TOKEN, 10.0, {}, b"c"), lane)
    assert worker.send(sent, lane) == []
    arriving = worker.state.sessions[TOKEN].arriving
    if end == "freed":
        worker.send(m.Free(((4, 1),)))
    elif end == "lost":
        worker.state.handle(Left(lane))
    else:
        assert worker.send(sent) == [], "over another connection, from the start"
        assert arriving[(4, 1)].sender == b"c"
    assert (end == "given up") is bool(arriving)
    if end != "lost":
        assert worker.send(piece(b"large tensor", 4), lane) == []
    assert worker.send(sent) == worker.send(piece(b"large tensor", 4)) == []
    assert worker.send(piece(b"large tensor", 8)) == [] and not arriving
    assert worker.state.sessions[TOKEN].tensors[(4, 1)].content == b"large tensor"


@pytest.mark.parametrize("end", ["lost", "silent"])
def test_a_run_that_waits_for_an_upload_that_ended_is_told_and_the_upload_may_begin_anew(worker: Worker,
                                                                                        end: str) -> None:
    lane, sent = b"\0lane1234", piece(b"large tensor", 0)
    worker.send(m.Hello(m.PROTOCOL_VERSION, TOKEN, 1000.0, {}, b"c"), lane)
    assert worker.send(sent, lane) == []
    waiting = run_of(worker.run((m.RESIDENT, 4, 1), incoming=((4, 1),)))
    if end == "lost":
        commands = worker.state.handle(Left(lane))
    else:
        assert worker.state.handle(Tick(UPLOAD_SILENCE_S - 1)) == []
        commands = worker.state.handle(Tick(UPLOAD_SILENCE_S + 1))
    assert failure_of(commands).kind == "StaleHandleError"
    assert Abandon(waiting) in commands and not worker.state.sessions[TOKEN].arriving
    assert failure_of(worker.run((m.RESIDENT, 4, 1), incoming=((4, 1),), call_id=10)).kind == "StaleHandleError"
    assert worker.send(sent) == []
    again = run_of(worker.run((m.RESIDENT, 4, 1), incoming=((4, 1),), call_id=11))
    worker.send(piece(b"large tensor", 4))
    assert run_of(worker.send(piece(b"large tensor", 8))) is again and again.env[0].content == b"large tensor"


@pytest.mark.parametrize("content", [("4", 1, (b"x",), None), (4, 1, (b"x",)), (4, 1, b"x", None),
                                     (4, 1, (b"x",), 5), 7])
def test_what_is_not_a_content_is_a_protocol_error(worker: Worker, content: Any) -> None:
    assert failure_of(worker.send(m.Put((content,)))).kind == "ProtocolError"


def test_an_announced_put_with_a_wrong_digest_fails_the_run_that_waits(worker: Worker) -> None:
    worker.run((m.RESIDENT, 4, 1), incoming=((4, 1),))
    commands = worker.send(m.Put(((4, 1, (b"tampered",), hashlib.sha256(b"original").digest()),)))
    assert failure_of(commands).request == 5
    assert failure_of(worker.run((m.RESIDENT, 4, 1))).kind == "ProtocolError"


def test_what_waits_for_a_run_that_is_refused_fails_with_it(worker: Worker) -> None:
    worker.load(keeps=(1,), returns=())
    waiting = run_of(worker.run((m.RESIDENT, 30, 0), incoming=((30, 0),)))
    commands = worker.run((m.RESIDENT, 99, 1), keeps=((30, 0),))
    told = [c.message for c in commands if isinstance(c, Reply)]
    assert [type(message) for message in told] == [m.Failure, m.Failure]
    assert [c.run for c in commands if isinstance(c, Abandon)] == [waiting]
    assert failure_of(worker.run((m.RESIDENT, 30, 0), incoming=((30, 0),))).kind == "StaleHandleError"


def test_content_is_adopted_by_digest_across_sessions(worker: Worker) -> None:
    digest = hashlib.sha256(b"weights").digest()
    worker.send(m.Put(((4, 1, (b"weights",), digest),)))
    worker.hello(OTHER, b"d")
    (reply,) = worker.send(m.Have(8, (digest, b"?" * 32)), b"d")
    assert isinstance(reply, Reply) and isinstance(reply.message, m.Done) and reply.message.info == (True, False)
    assert worker.send(m.Adopt(70, 1, digest), b"d") == []
    (reply,) = worker.send(m.Fetch(9, 70, 1), b"d")
    assert isinstance(reply, Reply) and isinstance(reply.message, m.Result)


def test_kept_values_are_stored_under_the_handles_of_the_call(worker: Worker) -> None:
    worker.load(keeps=(1,), returns=())
    run = run_of(worker.run(inline(b"x"), keeps=((30, 0),)))
    (reply,) = worker.state.handle(Finished(run, (), (Blob(b"act"),), 0.0))
    assert isinstance(reply, Reply) and isinstance(reply.message, m.Result)
    assert reply.message.kept == (("form", 3),) and reply.message.resident_bytes == 3
    worker.send(m.Free(((30, 0),)))
    assert failure_of(worker.send(m.Fetch(1, 30, 0))).kind == "StaleHandleError"
    assert worker.state.sessions[TOKEN].resident_bytes == 0


def test_kept_values_come_back_where_the_client_wants_none_kept(worker: Worker) -> None:
    worker.load(keeps=(1,), returns=())
    run = run_of(worker.run(inline(b"x")))
    (reply,) = worker.state.handle(Finished(run, (), (Blob(b"act"),), 0.0))
    assert isinstance(reply, Reply) and isinstance(reply.message, m.Result)
    assert reply.message.values == ((0, (m.INLINE, (b"act",))),) and reply.message.kept == ()


def test_pushed_values_wait_for_their_run_and_runs_for_their_values(worker: Worker) -> None:
    worker.load(inputs=(), receives=(0,))
    worker.send(m.Push(TOKEN, 9, 0, inline(b"early")))
    assert run_of(worker.run(call_id=9)).env[0].content == b"early"
    run = run_of(worker.run(call_id=10))
    assert run.awaited == {0}
    assert run_of(worker.send(m.Push(TOKEN, 10, 0, inline(b"late")))) is run and not run.awaited


def test_a_push_with_a_wrong_token_goes_nowhere(worker: Worker) -> None:
    assert worker.send(m.Push(b"?" * 16, 9, 0, inline(b"x"))) == []
    assert not worker.state.sessions[TOKEN].mailbox


def test_cancel_abandons_the_run_and_drops_late_pushes(worker: Worker) -> None:
    worker.load(inputs=(), receives=(0,))
    run = run_of(worker.run(call_id=9))
    (command,) = worker.send(m.Cancel(9))
    assert isinstance(command, Abandon) and command.run is run and run.abandoned
    assert worker.send(m.Push(TOKEN, 9, 0, inline(b"x"))) == []
    assert worker.state.handle(Finished(run, (), (), 0.0)) == []


def test_an_op_that_raises_is_told_by_its_type(worker: Worker) -> None:
    run = run_of(worker.run(1))
    told = failure_of(worker.state.handle(Failed(run, IndexError("index 7 is out of bounds"), 0.0)))
    assert told.request == 5 and told.facts == {"exception": "IndexError"} and "index 7" in told.message


def test_a_silent_session_expires_and_frees_what_it_held(worker: Worker) -> None:
    worker.send(m.Put(((4, 0, (b"x",), None),)))
    worker.now_s = 9.0
    worker.send(m.Ping())
    assert worker.state.handle(Tick(18.0)) == [] and TOKEN in worker.state.sessions
    worker.state.handle(Tick(19.5))
    assert TOKEN not in worker.state.sessions
    assert failure_of(worker.run(1)).kind == "StaleHandleError"


def test_bye_frees_the_session_and_answers(worker: Worker) -> None:
    run = run_of(worker.run(1))
    commands = worker.send(m.Bye(3))
    assert isinstance(commands[0], Abandon) and run.abandoned
    assert isinstance(commands[1], Reply) and isinstance(commands[1].message, m.Done)
    assert not worker.state.sessions


def test_a_draining_worker_serves_old_sessions_and_refuses_new_ones(worker: Worker) -> None:
    worker.state.draining = True
    assert failure_of(worker.hello(OTHER, b"d")).kind == "WorkerBusyError"
    assert run_of(worker.run(1))


def test_a_message_for_clients_is_refused(worker: Worker) -> None:
    assert failure_of(worker.send(m.Done(1, None))).kind == "ProtocolError"


def test_resident_arguments_are_remembered_until_one_of_them_is_freed(worker: Worker) -> None:
    worker.load(inputs=(0, 7))
    worker.send(m.Put(((4, 1, (b"w",), None),)))
    run_of(worker.send(m.Run(5, 1, 9, (inline(b"x"), (m.RESIDENT, 4, 1)), (), (), (), 3)))
    run = run_of(worker.send(m.Run(6, 1, 10, (inline(b"y"),), (), (), (), -3)))
    assert run.env[0].content == b"y" and run.env[7].content == b"w"
    assert failure_of(worker.send(m.Run(6, 1, 11, (inline(b"y"),), (), (), (), -2))).kind == "StaleHandleError"
    assert failure_of(worker.send(m.Run(6, 1, 11, (), (), (), (), -3))).kind == "ProtocolError"
    worker.send(m.Free(((4, 1),)))
    assert failure_of(worker.send(m.Run(6, 1, 12, (inline(b"y"),), (), (), (), -3))).kind == "StaleHandleError"


# ---------------------------------------------------------------- measurements
def test_a_calibration_is_left_to_the_shell(worker: Worker) -> None:
    (command,) = worker.send(m.Calibrate(4, False))
    assert isinstance(command, Measure) and command.message == m.Calibrate(4, False) and command.connection == b"c"


def test_an_echo_comes_back_to_whoever_knows_the_session(worker: Worker) -> None:
    """Also on a connection that has said no hello: that of another worker."""
    (reply,) = worker.send(m.Echo(7, TOKEN, (m.INLINE, (b"abc",))), connection=b"peer")
    assert isinstance(reply, Reply) and reply.connection == b"peer"
    assert isinstance(reply.message, m.Result) and reply.message.values == ((0, (m.INLINE, (b"abc",))),)
    for echo, kind in ((m.Echo(8, OTHER, (m.INLINE, (b"abc",))), "StaleHandleError"),
                       (m.Echo(9, TOKEN, 3), "ProtocolError")):
        (refused,) = worker.send(echo, connection=b"peer")
        assert isinstance(refused, Reply) and isinstance(refused.message, m.Failure) and refused.message.kind == kind


def test_a_probe_is_bounded(worker: Worker) -> None:
    for size_bytes in (0, -1, 1 << 40):
        (reply,) = worker.send(m.Probe(4, "tcp://a:1", "", (), size_bytes))
        assert isinstance(reply, Reply) and isinstance(reply.message, m.Failure)
    assert isinstance(worker.send(m.Probe(4, "tcp://a:1", "", (("shm", 1, "/x"),), 1000))[0], Measure)
    for offers in (("shm",), (("shm", "1", "/x"),), (("shm", 1),), (3,)):
        (reply,) = worker.send(m.Probe(4, "tcp://a:1", "", offers, 1000))
        assert isinstance(reply, Reply) and isinstance(reply.message, m.Failure)
