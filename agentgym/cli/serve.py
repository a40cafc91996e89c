"""``agentgym serve``: environments for other processes, in OpenEnv's protocol."""

from __future__ import annotations

from typing import Any

import click

from agentgym.cli.options import STACK_FIELDS, given, key_values, served_options
from agentgym.cli.output import messages

MIB = 2**20


@click.command("serve")
@click.argument("id")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: a free one.")
@click.option(
    "--token", envvar="AGENTGYM_SERVE_TOKEN", metavar="TEXT", show_envvar=True,
    help="What clients must know; needed at other addresses than this machine's own. "
    "Prefer the variable: others can read a command line.",
)  # fmt: skip
@served_options
@click.option(
    "--max-sessions", type=click.IntRange(1), default=256, show_default=True, help="Sessions at once."
)
@click.option(
    "--session-timeout", type=click.FloatRange(0), default=3600.0, show_default=True, metavar="SECONDS",
    help="End a session that asks for nothing this long; 0: never.",
)  # fmt: skip
@click.option(
    "--ping-interval", type=click.FloatRange(0), default=20.0, show_default=True, metavar="SECONDS",
    help="Ping each client this often; 0: never.",
)  # fmt: skip
@click.option(
    "--ping-timeout", type=click.FloatRange(0), default=300.0, show_default=True, metavar="SECONDS",
    help="End the session of a client that leaves a ping unanswered this long; 0: never.",
)  # fmt: skip
@click.option(
    "--max-message-mb", type=click.FloatRange(0, min_open=True), default=16.0, show_default=True,
    metavar="MIB", help="Largest message.",
)  # fmt: skip
def command(id: str, **options: Any) -> None:
    """Serve the environment ID to OpenEnv clients over WebSocket and HTTP.

    Each WebSocket connection is a session with an environment of its own. Once clients can connect, one line
    on stdout gives the address. Ctrl-C, or SIGTERM, closes every environment and ends the server.
    """
    from agentgym.cli.eval import _full
    from agentgym.serving.run import ServeConfig, require_packages, serve
    from agentgym.serving.sessions import Limits
    from agentgym.wrappers.stack import EnvConfig

    require_packages()
    stack = given(options, (*STACK_FIELDS, "worker"))
    env = EnvConfig(id=_full(id), kwargs=key_values(options["env_options"]), **stack)
    config = ServeConfig(
        env,
        split=options["split"],
        host=options["host"],
        port=options["port"],
        token=options["token"],
        limits=Limits(
            sessions=options["max_sessions"],
            idle_seconds=options["session_timeout"] or None,
            step_seconds=options["step_timeout"],
            reset_seconds=options["reset_timeout"],
        ),
        ping_interval=options["ping_interval"] or None,
        ping_timeout=options["ping_timeout"] or None,
        max_bytes=int(options["max_message_mb"] * MIB),
    )

    def started(url: str) -> None:
        click.echo(f"serving {env.id} at {url}")
        console = messages()
        token = "TOKEN" if config.token else ""
        given_token = f" --env token={token}" if token else ""
        console.print(
            f"try it: agentgym eval OpenEnv-v0 --env url={url}{given_token} --policy random", soft_wrap=True
        )
        console.print(
            f"WebSocket {url.replace('http', 'ws', 1)}/ws, HTTP reference {url}/docs", soft_wrap=True
        )
        if config.token and config.host not in ("127.0.0.1", "localhost", "::1"):
            console.print(
                "what clients send, the token too, is not encrypted: put a TLS proxy in front where the "
                "network is not yours",
                soft_wrap=True,
            )

    serve(config, started)
    messages().print("stopped")
