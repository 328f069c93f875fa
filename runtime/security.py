"""Who may talk to a worker: CURVE keys, the list of allowed keys, binding rules and socket options.

    embedded workers   no keys: their sockets lie in a directory of mode 0700 (launcher.py)
    tcp on loopback    keys optional
    tcp beyond it      keys, or the flag that says in so many words that anyone may run code here

A server's socket speaks CURVE and asks the ZAP handler (`Authenticator`) about each client's key. A dead
handler refuses: its socket stays bound, so nobody is let in unasked; ZAP_ENFORCE_DOMAIN covers a missing one.

Raises: ConfigError for keys, files and addresses that cannot be used.
"""
from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
import re
import socket as socket_module
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import zmq
from zmq.auth import load_certificate
from zmq.auth.thread import ThreadAuthenticator

from genie_dynamo.core.errors import ConfigError
from genie_dynamo.core.limits import DEFAULT_LIMITS, Limits

_LOG = logging.getLogger(__name__)

ZAP_DOMAIN = "genie"
UNSAFE_FLAG = "--allow-anyone-on-the-network"
HEARTBEAT_MESSAGE_BYTES = 1024       # a ping has some dozen bytes, but CURVE's handshake commands count too
_Z85_KEY = re.compile(rb"[0-9A-Za-z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}")
_TCP = re.compile(r"tcp://(?P<host>\[[^\]]*\]|[^:\[\]]*):(?P<port>\d{1,5}|\*)$")

Role = Literal["server", "client", "heartbeat"]


# ---------------------------------------------------------------- keys
@dataclass(frozen=True, slots=True, kw_only=True)
class Security:
    """The keys of one process, z85 text as bytes. Empty (`Security()`): no keys, plain sockets."""

    server_public: bytes | None = None
    server_secret: bytes | None = field(default=None, repr=False)
    client_public: bytes | None = None
    client_secret: bytes | None = field(default=None, repr=False)
    authorized_dir: Path | None = None      # its *.key files say who is let in; read at each handshake

    def __post_init__(self) -> None:
        for name in ("server_public", "server_secret", "client_public", "client_secret"):
            key = getattr(self, name)
            if key is not None and not is_curve_key(key):
                raise ConfigError(f"{name} is no CURVE key (40 characters of z85); `genie keygen` makes one")
        for side in ("server", "client"):
            if (getattr(self, f"{side}_public") is None) != (getattr(self, f"{side}_secret") is None):
                raise ConfigError(f"the {side}'s public and secret keys come together; one is missing")

    @property
    def is_server(self) -> bool:
        """True if sockets of this process can demand keys."""
        return self.server_secret is not None

    @classmethod
    def for_server(cls, directory: str | os.PathLike[str]) -> Self:
        """The worker's side of a directory of `generate_keys`: server.key_secret; every *.key is let in.

        Its own key is one of those and serves as its client key: workers with one key reach each other.
        """
        public, secret = load_key_pair(Path(directory) / "server.key_secret")
        return cls(server_public=public, server_secret=secret, client_public=public, client_secret=secret,
                   authorized_dir=Path(directory))

    @classmethod
    def for_client(cls, client_key: str | os.PathLike[str]) -> Self:
        """The client's side: the path of client.key_secret, or of the directory that holds it."""
        path = Path(client_key)
        public, secret = load_key_pair(path / "client.key_secret" if path.is_dir() else path)
        return cls(client_public=public, client_secret=secret)


def is_curve_key(text: bytes) -> bool:
    """True for 40 characters of z85."""
    return _Z85_KEY.fullmatch(text) is not None


def generate_keys(directory: str | os.PathLike[str]) -> list[Path]:
    """Write server.key_secret, server.key, client.key_secret, client.key: mode 0600, pyzmq's certificates.

    Returns: the paths.  Raises: ConfigError if one exists already; then nothing is written.
    """
    folder = Path(directory)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    paths = [folder / name for name in ("server.key_secret", "server.key", "client.key_secret", "client.key")]
    for path in paths:
        if path.exists() or path.is_symlink():
            raise ConfigError(f"{path} exists; keys are never overwritten: name another directory")
    for side in ("server", "client"):
        public, secret = zmq.curve_keypair()
        _write_key(folder / f"{side}.key_secret", public, secret)
        _write_key(folder / f"{side}.key", public, None)
    return paths


def _write_key(path: Path, public: bytes, secret: bytes | None) -> None:
    kind = "**Secret** Certificate: whoever holds it is let in" if secret else "Public Certificate"
    lines = [f"#   ZeroMQ CURVE {kind}", "metadata", "curve", f'    public-key = "{public.decode()}"']
    if secret:
        lines.append(f'    secret-key = "{secret.decode()}"')
    # O_EXCL: two runs at once cannot mix their keys; the mode holds from the first byte on.
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write("\n".join(lines) + "\n")


def load_public_key(path: str | os.PathLike[str]) -> bytes:
    """The public key in a certificate file. Raises: ConfigError."""
    try:
        public, _ = load_certificate(path)
    except (OSError, ValueError) as exc:
        why = exc if Path(path).exists() else "there is no such file"
        raise ConfigError(f"{path}: no CURVE key in it ({why}); `genie keygen` makes one") from exc
    if not is_curve_key(public):
        raise ConfigError(f"{path}: its public-key is not 40 characters of z85")
    return public


def load_key_pair(path: str | os.PathLike[str]) -> tuple[bytes, bytes]:
    """(public, secret) from a *.key_secret file that only its owner can read. Raises: ConfigError."""
    public = load_public_key(path)
    mode = Path(path).stat().st_mode & 0o077
    if mode:
        raise ConfigError(f"{path}: others can use this secret key (mode {mode:03o} too much); chmod 600")
    _, secret = load_certificate(path)
    if secret is None:
        raise ConfigError(f"{path}: only a public key; the secret one is in the file named *.key_secret")
    return public, secret


def authorized_keys(directory: Path) -> frozenset[bytes]:
    """Public keys of every *.key file in a directory; one that cannot be read is logged and skipped."""
    keys = set()
    for path in sorted(directory.glob("*.key")):
        try:
            keys.add(load_public_key(path))
        except ConfigError as exc:
            _LOG.warning("ignored a key file: %s", exc)
    return frozenset(keys)


# ---------------------------------------------------------------- sockets
def apply_server(socket: zmq.Socket[Any], security: Security, zap_domain: str = ZAP_DOMAIN) -> None:
    """Before bind: demand CURVE and a key on the list. Without server keys: nothing (see check_bind)."""
    if not security.is_server:
        return
    socket.curve_server = True
    socket.curve_publickey = security.server_public
    socket.curve_secretkey = security.server_secret
    socket.zap_domain = zap_domain.encode()
    with contextlib.suppress(zmq.ZMQError):     # builds without it still have the handler's bound socket
        socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)


def apply_client(socket: zmq.Socket[Any], security: Security, server_public: bytes | None) -> None:
    """Before connect: speak CURVE to a server with that key. None: a server without keys, a plain socket.

    Raises: ConfigError if the server has a key and this process has none to show.
    """
    if server_public is None:
        return
    if security.client_secret is None:
        raise ConfigError("the worker has a key, so it asks for ours, and there is none; name client_key "
                          "(its *.key must lie in the worker's key directory; `genie keygen` makes both)")
    socket.curve_serverkey = server_public
    socket.curve_publickey = security.client_public
    socket.curve_secretkey = security.client_secret


def harden(socket: zmq.Socket[Any], role: Role, limits: Limits = DEFAULT_LIMITS) -> None:
    """Set the options that every socket of ours has. Call before bind or connect.

    role: "server" is a worker's ROUTER, "client" a DEALER, "heartbeat" either end of the heartbeat channel.
    """
    heartbeat = role == "heartbeat"
    # Closing never waits for a peer that does not read; what must arrive is answered before we close.
    socket.linger = 0
    # A peer that announces more is cut off before anything is allocated for it.
    socket.maxmsgsize = HEARTBEAT_MESSAGE_BYTES if heartbeat else limits.message_bytes
    # A peer that connects and then says nothing holds a slot no longer than this.
    socket.handshake_ivl = 10_000
    # Bounded queues: a peer that floods us, or does not read, is slowed by TCP and not stored in our memory.
    socket.rcvhwm = 16 if heartbeat else limits.waiting_runs_per_session
    socket.sndhwm = 16 if heartbeat else limits.waiting_runs_per_session
    if socket.type == zmq.ROUTER:
        # An answer to a client that is gone is an error that we see, not a message silently dropped ...
        # except for echoes, whose proxy would end on it.
        socket.router_mandatory = not heartbeat
        # Nobody takes over a connection by choosing its identity.
        socket.router_handover = False
    # Both families; a name may resolve to either.
    socket.ipv6 = True
    # A machine that vanished without a word is found by the kernel after 30 + 3 * 10 s without traffic.
    socket.tcp_keepalive = 1
    socket.tcp_keepalive_idle = 30
    socket.tcp_keepalive_intvl = 10
    socket.tcp_keepalive_cnt = 3
    # A worker that is restarted is found again soon, and one that stays away is not hammered.
    socket.reconnect_ivl = 100
    socket.reconnect_ivl_max = 2_000
    if heartbeat:
        # ZMTP's own pings catch a peer whose kernel lives and whose process is stuck. Only here: on a payload
        # channel a pong waits behind the frame in transfer, and a large frame would look like death.
        socket.heartbeat_ivl = 5_000
        socket.heartbeat_timeout = 30_000


# ---------------------------------------------------------------- the allow-list
class _AllowList:
    """What ThreadAuthenticator asks: is this key in the directory now?"""

    def __init__(self, directory: Path | None, read: Callable[[Path], frozenset[bytes]]) -> None:
        self._directory = directory
        self._read = read

    def callback(self, domain: str, key: bytes) -> bool:
        try:
            allowed = self._directory is not None and key in self._read(self._directory)
        except Exception:       # it would end the handler's thread, and with it every later handshake
            _LOG.exception("cannot read the allow-list %s", self._directory)
            allowed = False
        if not allowed:
            _LOG.warning("refused a connection: key %s is not in %s", key.decode(), self._directory)
        return allowed


class Authenticator:
    """The ZAP handler of one zmq context: lets in the keys of `security.authorized_dir`, refuses all else.

    Close it after the server's sockets. While it is open, a dead thread refuses everybody.
    """

    def __init__(self, context: zmq.Context[Any], security: Security, zap_domain: str = ZAP_DOMAIN) -> None:
        self._inner = ThreadAuthenticator(context, log=logging.getLogger(f"{__name__}.zap"))
        provider = _AllowList(security.authorized_dir, authorized_keys)
        self._inner.configure_curve_callback(domain=zap_domain, credentials_provider=provider)
        self._inner.start()

    @property
    def alive(self) -> bool:
        """False: the thread has died, and nobody new gets in."""
        return bool(self._inner.is_alive())

    def close(self) -> None:
        """Stop the thread and free its sockets. Idempotent."""
        inner = self._inner
        if inner.pipe is not None and not inner.is_alive():
            inner.pipe.close(linger=0)      # nobody reads it any more: stop() would wait for ever
            inner.pipe = None  # type: ignore[assignment]  # as the class itself does
        inner.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# ---------------------------------------------------------------- where a worker may listen
def check_bind(address: str, security: Security, allow_unauthenticated: bool) -> None:
    """Refuse to listen beyond this machine without keys.

    Raises: ConfigError for an address that is not tcp://HOST:PORT or ipc://PATH, for a host that cannot be
            resolved, and for one that others can reach while there are no server keys.
    """
    if address.startswith("ipc://") and len(address) > len("ipc://"):
        return
    match = _TCP.match(address)
    if match is None or not match["host"] or (match["port"] != "*" and int(match["port"]) > 65535):
        raise ConfigError(f"cannot bind to {address!r}: give tcp://HOST:PORT (as tcp://127.0.0.1:5555 or "
                          "tcp://[::1]:5555) or ipc:///PATH", address=address)
    if security.is_server or allow_unauthenticated or _is_loopback(match["host"].strip("[]"), address):
        return
    raise ConfigError(
        f"{address} can be reached from other machines, and there are no keys: whoever connects could run "
        f"any computation here. Bind to tcp://127.0.0.1:{match['port']}, or make keys with "
        f"`genie keygen DIR` and pass --keys DIR, or say {UNSAFE_FLAG}", address=address)


def _is_loopback(host: str, address: str) -> bool:
    """True if every address that the host may mean is a loopback one."""
    if host in ("*", ""):
        return False
    if host == "lo":            # ZeroMQ also takes names of interfaces; this one is loopback by definition
        return True
    if host in {name for _, name in socket_module.if_nameindex()}:
        return False
    try:
        found = socket_module.getaddrinfo(host, None, type=socket_module.SOCK_STREAM)
    except OSError as exc:
        raise ConfigError(f"cannot bind to {address!r}: the host {host!r} has no address ({exc})",
                          address=address) from exc
    return all(_numeric_is_loopback(str(entry[4][0])) for entry in found)


def _numeric_is_loopback(text: str) -> bool:
    number = ipaddress.ip_address(text.partition("%")[0])
    mapped = getattr(number, "ipv4_mapped", None)
    return bool((mapped or number).is_loopback)
