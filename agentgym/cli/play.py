"""``agentgym play``: a person in an environment, at a terminal."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import click

from agentgym.cli.options import STACK_FIELDS, given, key_values, stack_options
from agentgym.cli.output import results
from agentgym.viewer.terminal import untrusted


@click.command("play")
@click.argument("id")
@click.option("--task", metavar="TASK", help="Id of the task; drawn if it is not given.")
@click.option("--split", metavar="NAME", help="Split to draw from; default: the training split.")
@click.option("--seed", type=click.IntRange(0), help="Draws the task and seeds the environment.")
@click.option("--solution", is_flag=True, help="Show the expert's actions first.")
@stack_options
def command(
    id: str, task: str | None, split: str | None, seed: int | None, solution: bool, **options: Any
) -> None:
    """Play the environment ID yourself. A number picks a listed action; Ctrl-D leaves."""
    from agentgym.wrappers.stack import EnvConfig

    with contextlib.suppress(ImportError):
        import readline as readline  # line editing and a history for input()
    wrappers = given(options, STACK_FIELDS)
    config = EnvConfig(id, key_values(options["env_options"]), **wrappers)
    chosen = {name: value for name, value in (("task_id", task), ("split", split)) if value is not None}
    env = config.build()
    try:
        observation, info = env.reset(seed=seed, options=chosen)
        _play(config, env, observation, info, solution)
    finally:
        env.close()


def _play(config: Any, env: Any, observation: Any, info: dict[str, Any], solution: bool) -> None:
    from agentgym.actions import make_parser
    from agentgym.policies.base import Request, Sampling, TurnView
    from agentgym.policies.human import HumanPolicy, PlayerLeft
    from agentgym.registry import base

    console = results()
    policy = HumanPolicy(make_parser(config.parser, **config.parser_options), console)
    content = env.get_wrapper_attr("content")
    console.rule(untrusted(f"{config.id}  {info['task_id']}", width=console.width - 4))
    if solution:
        plan = base(env).expert(base(env).task)
        console.print(untrusted(f"solution: {', '.join(plan) if plan else 'none is known'}", "green"))
    turn, ended = 0, False
    while not ended:
        listed = info.get("admissible_actions")
        view = TurnView(
            config.id,
            info["task_id"],
            "play",
            turn,
            content(observation),
            None if listed is None else tuple(listed),
        )
        try:
            [completion] = asyncio.run(policy.generate([Request("play", (), Sampling(), 0, view)]))
        except PlayerLeft:
            console.print(f"left after {turn} turns")
            return
        task_id = info["task_id"]
        observation, reward, terminated, truncated, info = env.step(completion.text)
        info.setdefault("task_id", task_id)
        turn, ended = turn + 1, terminated or truncated
        if not info["valid_action"]:
            console.print("(not understood; the turn counts)", style="yellow")
        if reward:
            console.print(f"(reward {reward:+g}, score {info['score']:g})", style="magenta")
    for part in content(observation):
        console.print(untrusted(getattr(part, "text", "[image]")))
    verdict = "solved" if info["success"] else "out of turns" if truncated else "not solved"
    console.rule(f"{verdict} after {turn} turns, score {info['score']:g}")
