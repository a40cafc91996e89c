"""``agentgym sandbox``: what runs, what is left, and sandboxes for other machines."""

from __future__ import annotations

import os
import secrets
import time
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from agentgym.cli.options import key_values
from agentgym.cli.output import messages, results, show, write_json
from agentgym.errors import AgentGymError, UsageError
from agentgym.viewer.terminal import untrusted


@click.group("sandbox")
def command() -> None:
    """See and clean up sandboxes; serve them to other machines."""


@command.command("ps")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def ps(as_json: bool) -> None:
    """List the sandboxes and snapshots of this machine, the oldest first."""
    from agentgym.sandboxes import records

    now = time.time()
    rows: list[dict[str, Any]] = [
        {
            "id": record.id,
            "backend": record.backend,
            "owner": record.owner,
            "pid": record.pid,
            "seconds": round(now - record.since, 1),
            "orphaned": record.orphaned,
        }
        for record in records.listed()
    ]
    if as_json:
        write_json(rows)
        return
    if not rows:
        messages().print("no sandbox runs")
        return
    table = Table("id", "backend", "owner", "process", "age", box=None, pad_edge=False)
    for row in rows:
        process = f"{row['pid']} (gone)" if row["orphaned"] else str(row["pid"])
        age = f"{row['seconds']:.0f} s"
        table.add_row(untrusted(row["id"]), untrusted(row["backend"]), untrusted(row["owner"]), process, age)
    show(results(), table)
    if any(row["orphaned"] for row in rows):
        messages().print("`agentgym sandbox gc` removes what processes that are gone have left")


@command.command("gc")
@click.option("--forget", is_flag=True, help="Forget what cannot be removed, as where its daemon is no more.")
def gc(forget: bool) -> None:
    """Remove what is left of sandboxes whose process is gone."""
    from agentgym.sandboxes import records

    done = records.collect()
    for record in done:
        click.echo(record.id)
    messages().print(f"removed {len(done)}")
    left = [record for record in records.listed() if record.orphaned]
    names = ", ".join(record.id for record in left[:5])
    if forget:
        for record in left:
            records.remove(record)
        if left:
            messages().print(f"forgot {names}{', …' if len(left) > 5 else ''}")
    elif left:
        raise AgentGymError(
            f"{len(left)} could not be removed: {names}",
            hint="see that the container daemon of each answers (DOCKER_HOST), then run this again; where it "
            "is no more, --forget",
        )


@command.command("build")
@click.option("--url", metavar="URL", help="The container daemon.  [default: $DOCKER_HOST, Docker's socket]")
def build(url: str | None) -> None:
    """Make the base image of container sandboxes, from Debian's packages, and print its name."""
    from agentgym.sandboxes.daemon import Daemon
    from agentgym.sandboxes.images import build

    daemon = Daemon(url)
    try:
        with messages().status("making the base image"):
            name = daemon.do(build.load)
    finally:
        daemon.close()
    click.echo(name)


@command.command("serve")
@click.option("--backend", default="bubblewrap", show_default=True, metavar="NAME", help="Kind of sandbox.")
@click.option(
    "--option", "options", multiple=True, metavar="KEY=VALUE", help="The backend's option; repeatable."
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at.")
@click.option("--port", type=click.IntRange(0, 65535), default=8010, show_default=True, help="0: a free one.")
@click.option(
    "--token-file", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", required=True,
    help="Holds what clients must know; made, with a new token in it, if it is not there.",
)  # fmt: skip
@click.option(
    "--max-sandboxes", type=click.IntRange(1), default=64, show_default=True, help="Sandboxes at a time."
)
@click.option(
    "--lease", type=click.FloatRange(0, min_open=True), default=60.0, show_default=True, metavar="SECONDS",
    help="Close the sandboxes of a client that is silent this long.",
)  # fmt: skip
def serve(
    backend: str,
    options: tuple[str, ...],
    host: str,
    port: int,
    token_file: Path,
    max_sandboxes: int,
    lease: float,
) -> None:
    """Serve sandboxes of this machine to other machines.

    Clients use the backend `remote` with this address and the token. A client's sandboxes end with its
    connection. Once clients can connect, one line on stdout gives the address. Ctrl-C, or SIGTERM, closes
    every sandbox and ends the host.
    """
    from agentgym.sandboxes import make_backend
    from agentgym.serving.access import is_loopback
    from agentgym.serving.run import require_packages

    require_packages()
    from agentgym.sandboxes.server import HostConfig
    from agentgym.sandboxes.server import serve as run

    config = HostConfig(_token(token_file), host, port, max_sandboxes, lease)
    given: dict[str, Any] = key_values(options)

    def started(url: str) -> None:
        click.echo(f"serving {backend} sandboxes at {url}")
        if not is_loopback(host):
            messages().print(
                "what clients send, the token too, is not encrypted: put a TLS proxy in front where the "
                "network is not yours",
                soft_wrap=True,
            )

    run(config, lambda: make_backend(backend, **given), started)
    messages().print("stopped")


def _token(place: Path) -> str:
    """What the file holds; a new token, which only its owner can read, where there is none.

    Raises:
        UsageError: It cannot be read or made.
    """
    try:
        try:
            fd = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            return place.read_text(encoding="utf-8").strip()
        with os.fdopen(fd, "w", encoding="utf-8") as file:
            token = secrets.token_urlsafe(32)
            file.write(f"{token}\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the token file {place} cannot be used: {error}", hint="name another") from error
    messages().print(f"a new token is in {place}", soft_wrap=True)
    return token
