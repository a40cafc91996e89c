"""``agentgym lamps TASK``: how a row looks, and how an expert darkens it."""

from __future__ import annotations

import click

import agentgym
from agentgym.registry import base


@click.command("lamps")
@click.argument("task_id", default="row-1")
@click.option("--lamps", default=6, show_default=True, help="Length of the row.")
def command(task_id: str, lamps: int) -> None:
    """Show a row of lamps and its solution."""
    env = agentgym.make("example/Lamps-v0", lamps=lamps)
    observation, _ = env.reset(options={"task_id": task_id})
    click.echo(observation)
    for action in base(env).expert(base(env).task) or ():
        observation, *_ = env.step(action)
        click.echo(f"{action} -> {observation}")
    env.close()
