"""One client's life with a set of workers: links, ids, residency, statistics, housekeeping, and its end."""
from __future__ import annotations

import itertools
import logging
import os
import secrets
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import zmq

from genie_dynamo.core import messages as m
from genie_dynamo.core.config import HOUSEKEEPING_S, Config
from genie_dynamo.core.errors import GenieError, SessionClosedError, WorkerError, WorkerLostError
from genie_dynamo.core.hardware import HardwareFacts, LinkFacts
from genie_dynamo.core.program import WorkerProgram
from genie_dynamo.core.stencil import WIDE
from genie_dynamo.runtime.client import stale, swapping
from genie_dynamo.runtime.client.connection import STREAM_GRACE_S, beside, to_error
from genie_dynamo.runtime.client.measuring import hardware_of, links_among, node_seconds_of
from genie_dynamo.runtime.client.residency import Residency
from genie_dynamo.runtime.client.workers import WorkerLink
from genie_dynamo.runtime.cluster import WorkerAddress
from genie_dynamo.runtime.heartbeat import HeartbeatMonitor
from genie_dynamo.runtime.lanes import dpdk
from genie_dynamo.runtime.lanes.compression import wanted
from genie_dynamo.runtime.lanes.zmq_frames import ZmqFrames
from genie_dynamo.runtime.launcher import EmbeddedWorker, start_embedded
from genie_dynamo.runtime.security import Security
from genie_dynamo.runtime.telemetry import Copies, Telemetry

log = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 2.0


class Session:
    """Made by genie.init. A context manager; belongs to the process that made it.

    Raises: WorkerUnreachableError where a worker does not answer; nothing is left running then.
    """

    def __init__(self, config: Config, remote: Sequence[WorkerAddress] = (), security: Security | None = None,
                 op_libraries: Sequence[str] = ()) -> None:
        self.config = config
        self.telemetry = Telemetry()
        self.op_libraries = tuple(dict.fromkeys((*config.op_libraries, *op_libraries)))
        self.namespaces: frozenset[str] = frozenset()     # op namespaces its graphs have asked for
        self.token = secrets.token_bytes(16)
        self.closed = ""
        self._pid = os.getpid()
        self._security = security or Security()
        self._context: zmq.Context[Any] = zmq.Context()
        self._ids = itertools.count(1)
        self._calls = itertools.count(WIDE)
        self._lock = threading.RLock()
        self._stop = threading.Event()
        self._housekeeper: threading.Thread | None = None
        self.residency = Residency(config.fingerprint_samples, self._queue_free, self.next_id)
        self.monitor = HeartbeatMonitor(interval_s=config.heartbeat_interval_s, timeout_s=config.heartbeat_timeout_s)
        self.prices = {worker.name: worker.price_per_hour for worker in remote if worker.price_per_hour is not None}
        self.links: list[WorkerLink] = []
        dpdk.use_port(config.dpdk_port)
        swapping.patch_torch()
        self._retired: list[WorkerLink] = []     # replaced, but activations of open graphs are still there
        try:
            if remote:
                for index, worker in enumerate(remote):
                    self.links.append(self._link(worker.name or f"w{index}", worker.address, worker.server_key, None))
            else:
                count = config.workers if isinstance(config.workers, int) else 1
                for index, embedded in enumerate(self._start(count)):
                    self.links.append(self._link(f"w{index}", embedded.address, None, embedded))
        except BaseException:
            self.close()
            raise
        self._housekeeper = threading.Thread(target=_housekeeping, args=(weakref.ref(self), self._stop),
                                             name="genie-housekeeping", daemon=True)
        self._housekeeper.start()

    # -- use --------------------------------------------------------------------------------------------------

    def check_open(self) -> None:
        """Raises: SessionClosedError after close, or in a forked child."""
        if self.closed:
            raise SessionClosedError(f"this session is closed ({self.closed}); genie.init() opens a new one")
        if os.getpid() != self._pid:
            raise SessionClosedError("this session belongs to the parent process; a forked child opens its own")

    def next_id(self) -> int:
        """A number nobody has used in this session: for tensors and programs."""
        return next(self._ids)

    def next_call(self) -> int:
        """The same for calls."""
        return next(self._calls)

    def pick(self, prefer: Sequence[str] = ()) -> WorkerLink:
        """The healthy worker with the fewest calls in flight; of equals one of `prefer`, else the first.

        Raises: WorkerLostError when all are lost and cannot be replaced.
        """
        self.check_open()
        if len(self.links) == 1 and not self.links[0].lost:
            return self.links[0]
        healthy = [link for link in self.links if not link.lost]
        if len(healthy) < len(self.links):
            self.replace_lost()
            healthy = [link for link in self.links if not link.lost]
        if not healthy:
            reasons = "; ".join(f"{link.name} at {link.address}: {link.lost}" for link in self.links)
            raise WorkerLostError(f"no worker of this session is left ({reasons}); start one and call genie.init again")
        if len(healthy) == 1:
            return healthy[0]
        return min(healthy, key=lambda link: (link.in_flight, link.name not in prefer))

    def replace_lost(self) -> None:
        """Restart lost embedded workers, and reconnect to remote ones that have come back."""
        with self._lock:
            for index, link in enumerate(self.links):
                if not link.lost:
                    continue
                self._forget(link)
                try:
                    if link.embedded is not None:
                        link.embedded.close(timeout_s=0.0)
                        embedded = self._start(1)[0]
                        fresh = self._link(link.name, embedded.address, None, embedded)
                    else:
                        fresh = self._link(link.name, link.address, link.server_key, None, timeout_s=1.0)
                except WorkerError as error:
                    log.warning("worker %s is lost (%s) and could not be replaced: %s", link.name, link.lost, error)
                    continue
                log.warning("worker %s was lost (%s); a new incarnation takes its place", link.name,
                            link.lost.splitlines()[0])
                self.telemetry.event("worker replaced")
                self.links[index] = fresh

    def serve(self, op_libraries: Sequence[str]) -> None:
        """Let embedded workers import more op libraries: new incarnations take over, the old ones keep what they hold.

        Running workers are started by their owner, with the libraries he names: for those nothing changes.
        """
        with self._lock:
            missing = [name for name in op_libraries if name not in self.op_libraries]
            if not missing or not all(link.embedded is not None for link in self.links):
                return
            self.op_libraries = (*self.op_libraries, *missing)
            for index, embedded in enumerate(self._start(len(self.links))):
                old = self.links[index]
                self.residency.worker_gone(old.key)
                self.links[index] = self._link(old.name, embedded.address, None, embedded)
                self._retired.append(old)

    def lost(self, link: WorkerLink) -> None:
        """A call has found that the worker is gone."""
        self.residency.worker_gone(link.key)

    def fetch(self, link: WorkerLink, tensor_id: int, epoch: int) -> torch.Tensor:
        """Bring a resident tensor here. Raises: StaleHandleError, WorkerError."""
        with link.connection() as connection:
            deadline_s = time.monotonic() + self.config.timeout_s
            request = connection.next_request()
            connection.request(m.Fetch(request, tensor_id, epoch))
            while True:
                answer, frames, header_bytes = connection.receive(deadline_s)
                if isinstance(answer, m.Failure):
                    raise to_error(answer, link.address)
                if isinstance(answer, m.Result) and answer.request == request:
                    break
        tensor = ZmqFrames().land(answer.values[0][1][1], frames, torch.device("cpu"))
        self.telemetry.moved(link.name, received={"state": tensor.numel() * tensor.element_size(),
                                                  "control": header_bytes})
        return tensor

    def hardware(self, timeout_s: float = 30.0, *, fresh: bool = False) -> dict[str, HardwareFacts]:
        """What each worker's device can do: from its cache, or measured while it is idle (under a second).

        Raises: WorkerTimeoutError, WorkerLostError.
        """
        with self._inside() as links:
            return {link.name: hardware_of(link, timeout_s, fresh=fresh) for link in links}

    def lanes(self, timeout_s: float = 30.0) -> tuple[LinkFacts, ...]:
        """Latency and bandwidth between this process and each worker, and between each two workers, measured now."""
        with self._inside() as links:
            return links_among(links, timeout_s)

    def profile(self, link: WorkerLink, program: WorkerProgram, timeout_s: float = 10.0) -> dict[str, float]:
        """Seconds by node of a loaded program, where it has run since this was last asked. Raises: WorkerError."""
        with self._inside():
            return node_seconds_of(link, program, timeout_s)

    @contextmanager
    def _inside(self) -> Iterator[list[WorkerLink]]:
        """The workers that live. `close` waits until this thread has left (see _settle)."""
        links = [link for link in self.links if not link.lost]
        for link in links:
            link.in_flight += 1
        try:
            self.check_open()
            yield links
        finally:
            for link in links:
                link.in_flight -= 1

    def stats(self) -> dict[str, Any]:
        """The session's counters, with each worker's memory and incarnation."""
        links = list(self.links)
        said = [self._ask_stats(link) for link in links]
        snapshot = self.telemetry.snapshot()
        snapshot["resident"] = self.residency.summary()
        for link, info in zip(links, said, strict=True):
            row = snapshot["workers"].setdefault(link.name, _empty_row())
            row.update(address=link.address, incarnation=link.incarnation, lost=link.lost or None,
                       lane=link.lane_facts())
            row.update({key: value for key, value in info.items() if key != "incarnation"})
        return snapshot

    def reset_stats(self) -> None:
        """Set the counters to zero; what workers have pushed to each other until now counts as before."""
        for link in list(self.links):
            self._ask_stats(link)
        self.telemetry.reset()

    def _ask_stats(self, link: WorkerLink, *, begin: bool = False) -> dict[str, Any]:
        """What a worker says about itself and this session; `{"error": ...}` where it does not, nothing once closed.

        Args: begin: copies count from here on: those that opened and proved the lane do not.
        """
        if link.lost or self.closed:
            return {}
        try:
            answer = link.ask(m.Stats, 5.0)
        except GenieError as error:
            return {"error": str(error)}
        info = dict(answer.info) if isinstance(answer, m.Done) else {}
        pushed = {"activations": info.get("pushed_bytes"), "state": info.get("moved_bytes")}
        self.telemetry.pushed(link.name, link.key, {k: v for k, v in pushed.items() if isinstance(v, int)})
        there = info.pop("copied", None)
        if type(there) is tuple and list(map(type, there)) == [int, int]:
            here = link.copies()
            self.telemetry.copied(link.key, Copies(here.moved_out, here.copied_out, there[1],
                                                   here.moved_in, here.copied_in, there[0]), begin=begin)
        return info

    # -- end --------------------------------------------------------------------------------------------------

    def close(self, reason: str = "shutdown was called") -> None:
        """End the session: workers forget it, embedded ones end. Idempotent; does nothing in a forked child."""
        if self.closed or os.getpid() != self._pid:
            return
        self._bring_home()
        self.closed = reason
        self._stop.set()
        self._settle()
        for link in self.links:
            if link.embedded is None and not link.lost:
                try:
                    link.ask(m.Bye, 2.0)
                except GenieError as error:
                    log.info("worker %s did not hear the goodbye: %s", link.name, error)
        self.monitor.close()
        for link in (*self.links, *self._retired):
            link.close()
            if link.embedded is not None:
                link.embedded.close()
        self._context.destroy(linger=0)

    def _bring_home(self) -> None:
        """What lives on workers alone comes here while they can be asked."""
        try:
            stale.bring_home()
        except GenieError as error:
            log.warning("parameters that live on workers alone could not be synchronised: %s", error)

    def _settle(self) -> None:
        """Let other threads leave: a ZeroMQ socket must not be closed while its thread is inside it.

        Calls under way see within a tenth of a second that the session is closed, and raise SessionClosedError.
        """
        if self._housekeeper is not None and threading.current_thread() is not self._housekeeper:
            self._housekeeper.join(timeout=CLOSE_TIMEOUT_S)
        deadline_s = time.monotonic() + CLOSE_TIMEOUT_S
        while any(link.in_flight for link in self.links) and time.monotonic() < deadline_s:
            time.sleep(0.005)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = f"closed: {self.closed}" if self.closed else ", ".join(f"{w.name}@{w.address}" for w in self.links)
        return f"<genie Session {state}>"

    # -- inside -----------------------------------------------------------------------------------------------

    def _start(self, count: int) -> list[EmbeddedWorker]:
        return start_embedded(
            count, num_threads=self.config.num_threads, op_libraries=self.op_libraries,
            connect_timeout_s=self.config.connect_timeout_s, log_level=self.config.log_level,
            memif=self.config.dpdk_port == "memif",
            resident_quota_bytes=None if self.config.resident_quota_gib is None
            else int(self.config.resident_quota_gib * 2**30))

    def _link(self, name: str, address: str, server_key: bytes | None, embedded: EmbeddedWorker | None,
              timeout_s: float | None = None) -> WorkerLink:
        link = WorkerLink(
            name=name, address=address, server_key=server_key, embedded=embedded, context=self._context,
            security=self._security, token=self.token,
            lease_s=0.0 if embedded is not None else self.config.session_lease_s,
            timeout_s=timeout_s or self.config.connect_timeout_s, why_lost=self._why_lost,
            require_lane=self.config.require_lane, busy_poll_s=self.config.busy_poll_s,
            codecs=wanted(self.config.compression),
            # The end of an embedded worker is seen at once, that of another by its heartbeat.
            grace_s=STREAM_GRACE_S if embedded is not None else (
                self.config.heartbeat_timeout_s + 2 * self.config.heartbeat_interval_s))
        alive = (lambda: embedded.alive) if embedded is not None else None
        self.monitor.add(link.key, beside(link.address, link.welcome.heartbeat_address), self._security,
                         link.incarnation, server_public=server_key, is_alive=alive)
        self._ask_stats(link, begin=True)
        return link

    def _why_lost(self, link: WorkerLink) -> str | None:
        if self.closed:
            raise SessionClosedError(f"the session was closed while a call was running ({self.closed})")
        if link.embedded is not None and not link.embedded.alive:
            return f"its process (pid {link.embedded.pid}) has ended: {link.embedded.exit_reason()}"
        return self.monitor.is_lost(link.key)

    def _forget(self, link: WorkerLink) -> None:
        self.residency.worker_gone(link.key)
        self.monitor.remove(link.key)
        link.close()

    def _queue_free(self, worker: str, key: tuple[int, int]) -> None:
        for link in self.links:
            if link.key == worker:
                link.frees.append(key)

    def housekeeping(self) -> None:
        """Once a second: keep leases, free what finalizers have queued, and give back memory."""
        for link in [link for link in self._retired if not link.num_saved and not link.in_flight]:
            self._retired.remove(link)
            self._forget(link)
            if link.embedded is not None:
                link.embedded.close()
        for link in list(self.links):
            if link.lost:
                continue
            try:
                frees = link.take_frees()
                if frees:
                    link.tell(m.Free(frees))
                while link.drops:
                    link.tell(m.Drop(link.drops.popleft()))
                if link.embedded is None:
                    link.tell(m.Ping())
                link.tidy()
            except GenieError as error:
                log.info("housekeeping of %s: %s", link.name, error)


def _housekeeping(session_ref: weakref.ref[Session], stop: threading.Event) -> None:
    while not stop.wait(HOUSEKEEPING_S):
        session = session_ref()
        if session is None or session.closed:
            return
        try:
            session.housekeeping()
        except zmq.ZMQError as error:
            if not session.closed:
                log.warning("housekeeping: %s", error)
        del session


def _empty_row() -> dict[str, Any]:
    blank = Telemetry()
    blank.moved("", sent={})
    row: dict[str, Any] = blank.snapshot()["workers"][""]
    return row
