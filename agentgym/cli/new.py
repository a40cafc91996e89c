"""``agentgym new``: scaffold an installable environment package."""

from __future__ import annotations

import shlex
from pathlib import Path

import click


@click.command("new")
@click.argument("name")
@click.option(
    "--folder", type=click.Path(path_type=Path), default=Path(), help="Where the package's folder is made."
)
def command(name: str, folder: Path) -> None:
    """Write the package NAME: one environment, registered as a plug-in, with a test that passes."""
    from agentgym.scaffold import create

    for path in create(name, folder):
        click.echo(path)
    package, tests = shlex.quote(f"{folder / name}[dev]"), shlex.quote(str(folder / name))
    click.echo(f"\nnext: pip install -e {package} && python -m pytest {tests}")
