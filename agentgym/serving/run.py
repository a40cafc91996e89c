"""Running a server: its address, its keep-alive, its end.

Invariants: a server reachable from other machines has a token; the first SIGINT or SIGTERM refuses new
sessions, ends the others and closes every environment, the second does not wait for them.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from agentgym.errors import MissingDependency, UsageError
from agentgym.serving.access import is_loopback
from agentgym.serving.sessions import Limits, Sessions
from agentgym.wrappers.stack import EnvConfig

if TYPE_CHECKING:
    import uvicorn

SHUTDOWN_SECONDS = 15.0
COLLECT_SECONDS, COLLECT_ALL_SECONDS = 3.0, 600.0
TWICE_SECONDS = 1.0
"""Signals this close together are one: whoever ends a process group sends it to a process twice."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServeConfig:
    """A server.

    Attributes:
        env: The environment of every session.
        split: Where tasks are drawn from; ``None``: the family's first split.
        host: Address to listen at.
        port: Port; 0 takes a free one.
        token: What clients must know; needed at any other address than this machine's own.
        limits: What sessions may use.
        ping_interval: Seconds between two pings of a connection; ``None``: no pings.
        ping_timeout: Seconds after which an unanswered ping ends the connection; ``None``: never. A client
            that computes for long without reading answers late, so this is long.
        max_bytes: Largest message and largest body; also what a session's messages may hold that wait for
            their turn.
        request_seconds: Deadline for an HTTP request to arrive, head and body; what it then takes is not
            counted.

    Raises:
        UsageError: Others could reach the server, and it has no token.
    """

    env: EnvConfig
    split: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    token: str | None = field(default=None, repr=False)
    limits: Limits = field(default_factory=Limits)
    ping_interval: float | None = 20.0
    ping_timeout: float | None = 300.0
    max_bytes: int = 16 * 2**20
    request_seconds: float = 60.0

    def __post_init__(self) -> None:
        if self.token is not None and not self.token.strip():
            raise UsageError("the token is empty", hint="give one that cannot be guessed")
        if self.token is None and not is_loopback(self.host):
            raise UsageError(
                f"at {self.host} other machines reach this server, and it has no token",
                hint="set AGENTGYM_SERVE_TOKEN (or --token), or leave --host out",
            )


def serve(config: ServeConfig, started: Callable[[str], None] = lambda url: None) -> None:
    """Serve until a signal ends it.

    Args:
        config: The server.
        started: Called with the server's URL (``http://host:port``) once clients can connect.

    Raises:
        MissingDependency: The extra ``serve`` is not installed.
        UsageError: The address cannot be used.
        AgentGymError: The environment cannot be made.
    """
    require_packages()
    sessions = Sessions(config.env, split=config.split, limits=config.limits)
    try:
        listening = listen(config.host, config.port)
    except BaseException:
        sessions.catalogue.close()
        raise
    with contextlib.closing(listening):
        asyncio.run(_serve(config, sessions, listening, started))


def require_packages() -> None:
    """Check that the extra is there.

    Raises:
        MissingDependency: It is not.
    """
    for package in ("fastapi", "uvicorn", "websockets"):
        if find_spec(package) is None:
            raise MissingDependency(package, "serve")


async def _serve(
    config: ServeConfig, sessions: Sessions, listening: socket.socket, started: Callable[[str], None]
) -> None:
    server = build(config, sessions, lambda: started(url_of(listening)))
    collector = asyncio.create_task(spare_the_collector(sessions))
    try:
        with ended_by_signals(server):
            await server.serve(sockets=[listening])
    finally:
        collector.cancel()
    if server.force_exit:
        # Nobody waits: the workers die with this process, and what is held goes with it.
        _log.warning("stopped without waiting for %d sessions", sessions.active)
    if not server.started:
        raise UsageError("the server did not start", hint="its last words are above")


def build(
    config: ServeConfig, sessions: Sessions, started: Callable[[], None] = lambda: None
) -> uvicorn.Server:
    """The server of ``config``, for a caller that runs it on its own event loop.

    It installs no signal handlers; ``should_exit = True`` ends it.

    Args:
        config: The server.
        sessions: What it serves; closed at its end.
        started: Called once clients can connect.

    Raises:
        MissingDependency: The extra ``serve`` is not installed.
    """
    require_packages()
    from agentgym.serving.app import create_app

    app = create_app(sessions, token=config.token, max_bytes=config.max_bytes)
    return http_server(
        app,
        max_bytes=config.max_bytes,
        ping_interval=config.ping_interval,
        ping_timeout=config.ping_timeout,
        request_seconds=config.request_seconds,
        started=started,
    )


def http_server(
    app: Any,
    *,
    max_bytes: int,
    ping_interval: float | None,
    ping_timeout: float | None,
    request_seconds: float = 60.0,
    started: Callable[[], None] = lambda: None,
) -> uvicorn.Server:
    """A server of any ASGI application, with this project's settings; see :func:`build`.

    Args:
        app: The application.
        max_bytes: Largest message of a WebSocket.
        ping_interval: See :class:`ServeConfig`.
        ping_timeout: The same.
        request_seconds: The same.
        started: Called once clients can connect.

    Raises:
        MissingDependency: The extra ``serve`` is not installed.
    """
    require_packages()
    return plain_server(
        app,
        request_seconds=request_seconds,
        started=started,
        ws="websockets-sansio",  # the other one stands on a part of websockets that is deprecated
        ws_max_size=max_bytes,
        ws_ping_interval=ping_interval,
        ws_ping_timeout=ping_timeout,
        ws_per_message_deflate=False,  # it costs more time than loopback and LAN give back
    )


def plain_server(
    app: Any,
    *,
    request_seconds: float = 60.0,
    shutdown_seconds: float = SHUTDOWN_SECONDS,
    started: Callable[[], None] = lambda: None,
    **settings: Any,
) -> uvicorn.Server:
    """As :func:`http_server`, without what is WebSockets' alone; it needs no package but uvicorn.

    Args:
        app: The application.
        request_seconds: See :class:`ServeConfig`.
        shutdown_seconds: How long answers that are under way are waited for at the end.
        started: Called once clients can connect.
        **settings: More of uvicorn's.
    """
    import uvicorn

    from agentgym.serving.deadline import with_deadline

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            # uvicorn's own raise the signal again at the end, which would kill the process.
            yield

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if self.started:
                started()

    own: dict[str, Any] = {
        "http": with_deadline(request_seconds),
        "timeout_graceful_shutdown": int(shutdown_seconds),
        "lifespan": "on",
        "log_config": None,
        "access_log": False,
        "server_header": False,
        "proxy_headers": False,
    }
    return Server(uvicorn.Config(app, **own, **settings))


async def spare_the_collector(sessions: Sessions) -> None:
    """Keep Python's garbage collector off the environments, for ever.

    They live long and hold many objects: with 256 TextWorld games a full collection stops all sessions for a
    quarter of a second or more, and comes every few seconds. What is there is set aside when sessions have
    been added, and looked at every ten minutes.
    """
    most, last = 0, 0.0
    while True:
        await asyncio.sleep(COLLECT_SECONDS)
        if sessions.most > most or time.monotonic() - last > COLLECT_ALL_SECONDS:
            most, last = sessions.most, time.monotonic()
            gc.unfreeze()
            gc.collect()
            gc.freeze()


@contextlib.contextmanager
def ended_by_signals(server: uvicorn.Server) -> Iterator[None]:
    """SIGINT or SIGTERM ends ``server``; a second one does not wait."""
    first: float | None = None

    def stop() -> None:
        nonlocal first
        now = time.monotonic()
        if first is None:
            first, server.should_exit = now, True
        elif now - first > TWICE_SECONDS:
            server.force_exit = True
            # It would write a traceback of what it leaves behind.
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)

    with on_signals(stop):
        yield


@contextlib.contextmanager
def on_signals(stop: Callable[[], object]) -> Iterator[None]:
    """Have the running event loop call ``stop`` at every SIGINT and SIGTERM."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)
    try:
        yield
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


def url_of(listening: socket.socket) -> str:
    """``http://host:port`` of a socket that listens."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens at an address.

    Raises:
        UsageError: It cannot be used.
    """
    _raise_file_limit()
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=2048)
    except OSError as error:
        raise UsageError(
            f"cannot listen at {host}, port {port}: {error.strerror or error}",
            hint="choose another port (0 takes a free one), or another address",
        ) from error


def _raise_file_limit() -> None:
    """A connection is an open file: take as many as the system lets this process have."""
    if sys.platform == "win32":
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(hard, 65_536) if hard != resource.RLIM_INFINITY else 65_536
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
