"""``agentgym mcp``: an environment for an MCP client."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import click

from agentgym.cli.options import STACK_FIELDS, given, key_values, served_options
from agentgym.cli.output import messages
from agentgym.errors import UsageError


@click.command("mcp")
@click.argument("id")
@click.option(
    "--http", metavar="HOST:PORT", help="Serve over streamable HTTP, not stdio; port 0 takes a free one."
)
@click.option(
    "--token", envvar="AGENTGYM_SERVE_TOKEN", metavar="TEXT", show_envvar=True,
    help="With --http, what clients must know; needed at other addresses than this machine's own. "
    "Prefer the variable: others can read a command line.",
)  # fmt: skip
@served_options
@click.option(
    "--max-sessions",
    type=click.IntRange(1),
    default=64,
    show_default=True,
    help="With --http, sessions at once.",
)
@click.option(
    "--session-timeout", type=click.FloatRange(0), default=3600.0, show_default=True, metavar="SECONDS",
    help="With --http, end a session that asks for nothing this long; 0: never.",
)  # fmt: skip
def command(id: str, **options: Any) -> None:
    """Serve the environment ID to MCP clients: its tools, and `reset` and `act`.

    An MCP client, such as a desktop assistant, is configured to start this command; it then speaks the
    protocol over standard input and output. Each session plays in an environment of its own, one episode at a
    time: `reset` tells the task, calls are actions, and the structured content of an answer holds the reward,
    the success and whether the episode is over.
    """
    from agentgym.cli.eval import _full
    from agentgym.serving.access import is_loopback
    from agentgym.serving.run import listen
    from agentgym.serving.sessions import Limits, Sessions
    from agentgym.tools import mcp_server
    from agentgym.tools.mcp import require_packages
    from agentgym.wrappers.stack import EnvConfig

    require_packages()
    http = None if options["http"] is None else _address(options["http"])
    token = options["token"]
    if token is not None and not token.strip():
        raise UsageError("the token is empty", hint="give one that cannot be guessed")
    if http is not None and token is None and not is_loopback(http[0]):
        raise UsageError(
            f"at {http[0]} other machines reach this server, and it has no token",
            hint="set AGENTGYM_SERVE_TOKEN (or --token), or listen at 127.0.0.1",
        )
    stack = given(options, (*STACK_FIELDS, "worker"))
    env = EnvConfig(id=_full(id), kwargs=key_values(options["env_options"]), **stack)
    limits = Limits(
        sessions=options["max_sessions"],
        idle_seconds=(options["session_timeout"] or None) if http is not None else None,
        step_seconds=options["step_timeout"],
        reset_seconds=options["reset_timeout"],
    )
    if http is None:
        with mcp_server.own_streams() as streams:
            asyncio.run(
                mcp_server.serve_stdio(Sessions(env, split=options["split"], limits=limits), *streams)
            )
        return

    def started(url: str) -> None:
        click.echo(f"serving {env.id} at {url}")

    with contextlib.closing(listen(*http)) as listening:
        sessions = Sessions(env, split=options["split"], limits=limits)
        asyncio.run(mcp_server.serve_http(sessions, listening, token, started))
    messages().print("stopped")


def _address(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if not colon or not port.isdecimal() or int(port) > 65_535 or not host.strip("[]"):
        raise UsageError(f"{text!r} is no address", hint="write HOST:PORT, such as 127.0.0.1:8000")
    return host.strip("[]"), int(port)
