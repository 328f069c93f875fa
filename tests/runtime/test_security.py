"""Keys, who is let in, where a worker may listen, and the options of every socket."""
from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq
from zmq.auth import load_certificate

from genie_dynamo.core.errors import ConfigError
from genie_dynamo.core.limits import Limits
from genie_dynamo.runtime.security import (
    UNSAFE_FLAG,
    Authenticator,
    Security,
    apply_client,
    apply_server,
    authorized_keys,
    check_bind,
    generate_keys,
    harden,
    load_key_pair,
)

ARRIVES_S = 5.0
REFUSED_S = 0.4      # long enough for a handshake on this machine to have succeeded many times


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    generate_keys(tmp_path / "keys")
    return tmp_path / "keys"


class Server:
    """A worker's socket with keys, and connections to it."""

    def __init__(self, security: Security, zap_domain: str = "genie", authenticator: bool = True) -> None:
        self.context = zmq.Context()
        self.authenticator = Authenticator(self.context, security) if authenticator else None
        self.socket = self.context.socket(zmq.ROUTER)
        harden(self.socket, "server")
        apply_server(self.socket, security, zap_domain)
        self.socket.bind("tcp://127.0.0.1:*")
        self.address = self.socket.last_endpoint.decode()

    def hears(self, security: Security, server_public: bytes | None, wait_s: float) -> bool:
        """Whether a message of a new client arrives."""
        context = zmq.Context()
        client = context.socket(zmq.DEALER)
        try:
            harden(client, "client")
            apply_client(client, security, server_public)
            client.connect(self.address)
            client.send(b"hello")
            if not self.socket.poll(int(wait_s * 1000)):
                return False
            return bool(self.socket.recv_multipart()[1:] == [b"hello"])
        finally:
            client.close(linger=0)
            context.term()

    def close(self) -> None:
        self.socket.close(linger=0)
        if self.authenticator is not None:
            self.authenticator.close()
            self.authenticator.close()
        self.context.term()


@pytest.fixture
def serve() -> Iterator[Any]:
    servers: list[Server] = []

    def make(*args: Any, **options: Any) -> Server:
        servers.append(Server(*args, **options))
        return servers[-1]

    yield make
    for server in servers:
        server.close()


# ---------------------------------------------------------------- key files
def test_keys_are_written_for_their_owner_in_pyzmqs_format(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        paths = generate_keys(tmp_path / "new" / "keys")
    finally:
        os.umask(old)
    assert sorted(path.name for path in paths) == ["client.key", "client.key_secret", "server.key", "server.key_secret"]
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in paths)
    assert stat.S_IMODE(paths[0].parent.stat().st_mode) == 0o700
    for side in ("server", "client"):
        public, secret = load_certificate(paths[0].parent / f"{side}.key_secret")
        assert load_certificate(paths[0].parent / f"{side}.key") == (public, None)
        assert secret is not None and zmq.curve_public(secret) == public


@pytest.mark.parametrize("existing", ["server.key_secret", "client.key"])
def test_keys_are_never_overwritten(tmp_path: Path, existing: str) -> None:
    (tmp_path / existing).write_text("precious")
    with pytest.raises(ConfigError, match=f"{existing} exists"):
        generate_keys(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [existing]
    assert (tmp_path / existing).read_text() == "precious"


def test_a_secret_key_that_others_can_read_is_refused(keys: Path) -> None:
    (keys / "server.key_secret").chmod(0o640)
    with pytest.raises(ConfigError, match=r"mode 040 too much.*chmod 600"):
        Security.for_server(keys)


@pytest.mark.parametrize(("content", "says"), [
    (None, "there is no such file"), ("", "no CURVE key in it"), ('public-key = "short"', "not 40 characters"),
    ('public-key = "' + "a" * 40 + '"', "only a public key"),
])
def test_a_file_without_a_key_is_named(tmp_path: Path, content: str | None, says: str) -> None:
    path = tmp_path / "client.key_secret"
    if content is not None:
        path.write_text(content)
        path.chmod(0o600)
    with pytest.raises(ConfigError, match=f"client.key_secret.*{says}"):
        load_key_pair(path)


def test_secrets_are_not_printed(keys: Path) -> None:
    for security in (Security.for_server(keys), Security.for_client(keys)):
        for secret in (security.server_secret, security.client_secret):
            assert secret is None or secret.decode() not in repr(security)


def test_half_a_pair_and_wrong_text_are_refused() -> None:
    public, _ = zmq.curve_keypair()
    with pytest.raises(ConfigError, match="come together"):
        Security(client_public=public)
    with pytest.raises(ConfigError, match="no CURVE key"):
        Security(server_public=b"a" * 39 + b"\n", server_secret=b"b" * 40)


def test_the_allow_list_skips_what_is_no_key(keys: Path, caplog: pytest.LogCaptureFixture) -> None:
    (keys / "broken.key").write_text("nothing")
    assert authorized_keys(keys) == {load_certificate(keys / f"{side}.key")[0] for side in ("server", "client")}
    assert "broken.key" in caplog.text


# ---------------------------------------------------------------- who is let in
def test_a_listed_key_is_let_in_and_others_are_not(keys: Path, tmp_path: Path, serve: Any) -> None:
    security = Security.for_server(keys)
    server = serve(security)
    ours, public = Security.for_client(keys), security.server_public
    generate_keys(tmp_path / "stranger")
    stranger = Security.for_client(tmp_path / "stranger")
    assert not server.hears(Security(), None, REFUSED_S)                                     # no key at all
    assert not server.hears(stranger, public, REFUSED_S)                                     # a key that is not listed
    assert not server.hears(ours, load_certificate(tmp_path / "stranger/server.key")[0], REFUSED_S)   # not its key
    assert server.hears(ours, public, ARRIVES_S)
    assert server.hears(security, public, ARRIVES_S)                                        # a worker of the same key


def test_the_list_is_read_at_each_handshake(keys: Path, tmp_path: Path, serve: Any) -> None:
    security = Security.for_server(keys)
    server = serve(security)
    generate_keys(tmp_path / "late")
    late = Security.for_client(tmp_path / "late")
    assert not server.hears(late, security.server_public, REFUSED_S)
    (keys / "late.key").write_bytes((tmp_path / "late/client.key").read_bytes())
    assert server.hears(late, security.server_public, ARRIVES_S)
    (keys / "late.key").unlink()
    assert not server.hears(late, security.server_public, REFUSED_S)


def test_a_list_that_cannot_be_read_lets_nobody_in_and_can_be_mended(
    keys: Path, serve: Any, monkeypatch: pytest.MonkeyPatch,
) -> None:
    broken = True

    def read(directory: Path) -> frozenset[bytes]:
        if broken:
            raise OSError("the disk is gone")
        return authorized_keys(directory)

    monkeypatch.setattr("genie_dynamo.runtime.security.authorized_keys", read)
    security = Security.for_server(keys)
    server = serve(security)
    assert not server.hears(Security.for_client(keys), security.server_public, REFUSED_S)
    assert server.authenticator.alive
    broken = False
    assert server.hears(Security.for_client(keys), security.server_public, ARRIVES_S)


def test_without_a_handler_nobody_gets_in(keys: Path, serve: Any) -> None:
    security = Security.for_server(keys)
    server = serve(security, authenticator=False)
    assert not server.hears(Security.for_client(keys), security.server_public, REFUSED_S)


def test_with_a_dead_handler_nobody_gets_in(keys: Path, serve: Any) -> None:
    security = Security.for_server(keys)
    server = serve(security)
    assert server.hears(Security.for_client(keys), security.server_public, ARRIVES_S)
    inner = server.authenticator._inner
    inner.pipe.send(b"TERMINATE")
    inner.thread.join(5)
    assert not server.authenticator.alive
    assert not server.hears(Security.for_client(keys), security.server_public, REFUSED_S)


def test_a_socket_of_another_domain_is_not_covered(keys: Path, serve: Any) -> None:
    security = Security.for_server(keys)
    server = serve(security, zap_domain="elsewhere")
    assert not server.hears(Security.for_client(keys), security.server_public, REFUSED_S)


def test_a_server_without_keys_is_a_plain_socket(serve: Any) -> None:
    assert serve(Security(), authenticator=False).hears(Security(), None, ARRIVES_S)


def test_a_client_without_a_key_is_told_before_it_connects(keys: Path) -> None:
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket, pytest.raises(ConfigError, match="client_key"):
        apply_client(socket, Security(), Security.for_server(keys).server_public)


# ---------------------------------------------------------------- where a worker may listen
@pytest.mark.parametrize("address", [
    "tcp://127.0.0.1:5555", "tcp://127.8.9.1:*", "tcp://localhost:0", "tcp://[::1]:5555", "tcp://lo:5555",
    "tcp://[::ffff:127.0.0.1]:5555", "ipc:///run/user/0/x",
])
def test_this_machine_needs_no_keys(address: str) -> None:
    check_bind(address, Security(), allow_unauthenticated=False)


@pytest.mark.parametrize("address", [
    "tcp://*:5555", "tcp://0.0.0.0:5555", "tcp://[::]:5555", "tcp://10.0.0.1:5555", "tcp://[fe80::1]:5555",
    "tcp://192.168.1.7:*", "tcp://0:5555", "tcp://[::ffff:10.0.0.1]:1",
])
def test_beyond_it_keys_or_plain_words_are_needed(address: str, keys: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        check_bind(address, Security(), allow_unauthenticated=False)
    assert address in str(caught.value) and UNSAFE_FLAG in str(caught.value) and "genie keygen" in str(caught.value)
    check_bind(address, Security.for_server(keys), allow_unauthenticated=False)
    check_bind(address, Security(), allow_unauthenticated=True)
    with pytest.raises(ConfigError):      # a client's keys protect nobody who listens
        check_bind(address, Security.for_client(keys), allow_unauthenticated=False)


def test_an_interface_is_loopback_only_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.if_nameindex", lambda: [(1, "lo"), (2, "eth0")])
    with pytest.raises(ConfigError, match="other machines"):
        check_bind("tcp://eth0:5555", Security(), allow_unauthenticated=False)


def test_a_name_with_one_address_beyond_loopback_needs_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [(2, 1, 6, "", ("127.0.0.1", 0)), (2, 1, 6, "", ("10.1.2.3", 0))]
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: found)
    with pytest.raises(ConfigError, match="other machines"):
        check_bind("tcp://two-faced:5555", Security(), allow_unauthenticated=False)


@pytest.mark.parametrize("address", [
    "5555", "tcp://127.0.0.1", "tcp://:5555", "tcp://127.0.0.1:99999", "udp://127.0.0.1:1", "ipc://", "",
    "tcp://::1:5555", "tcp://127.0.0.1:5555/x",
])
def test_other_addresses_are_explained(address: str) -> None:
    with pytest.raises(ConfigError, match="give tcp://HOST:PORT"):
        check_bind(address, Security(), allow_unauthenticated=True)


# ---------------------------------------------------------------- socket options
def test_hardened_sockets(serve: Any) -> None:
    limits = Limits(message_bytes=1 << 20, waiting_runs_per_session=7)
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router, context.socket(zmq.DEALER) as beat:
        harden(router, "server", limits)
        harden(beat, "heartbeat", limits)
        assert (router.linger, router.maxmsgsize, router.rcvhwm, router.sndhwm) == (0, 1 << 20, 7, 7)
        assert (router.tcp_keepalive, router.ipv6, router.heartbeat_ivl) == (1, True, 0)
        assert beat.maxmsgsize == 1024 and beat.heartbeat_ivl > 0


def test_a_message_beyond_the_limit_ends_the_connection_and_not_the_server() -> None:
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router, context.socket(zmq.DEALER) as client:
        harden(router, "server", Limits(message_bytes=1000))
        harden(client, "client")
        router.bind("tcp://127.0.0.1:*")
        client.connect(router.last_endpoint)
        client.send(b"x" * 2000)
        assert not router.poll(200)
        with context.socket(zmq.DEALER) as second:
            second.connect(router.last_endpoint)
            second.send(b"small")
            assert router.poll(5000) and router.recv_multipart()[1] == b"small"


def test_an_answer_to_nobody_is_an_error_and_an_identity_is_not_taken_over() -> None:
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        harden(router, "server")
        router.bind("tcp://127.0.0.1:*")
        with pytest.raises(zmq.ZMQError, match=r"[Hh]ost unreachable|No route"):
            router.send_multipart([b"nobody", b"hello"])
        with context.socket(zmq.DEALER) as first, context.socket(zmq.DEALER) as thief:
            first.identity = thief.identity = b"same"
            first.connect(router.last_endpoint)
            first.send(b"first")
            assert router.poll(5000) and router.recv_multipart() == [b"same", b"first"]
            thief.connect(router.last_endpoint)
            thief.send(b"thief")
            assert not router.poll(300)
            router.send_multipart([b"same", b"for the first"])
            assert first.poll(5000) and first.recv() == b"for the first"
            assert not thief.poll(100)
