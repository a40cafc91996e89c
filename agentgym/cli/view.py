"""``agentgym view``: read the episodes of a run."""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from agentgym.cli.output import results, show
from agentgym.errors import UnknownName

if TYPE_CHECKING:
    from agentgym.trajectory import Trajectory
    from agentgym.viewer.episodes import Decode


@click.command("view")
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("episode", required=False)
@click.option("--all", "every", is_flag=True, help="Print every episode.")
@click.option("--only", type=click.Choice(["solved", "unsolved", "lost", "running"]), help="Filter.")
@click.option("--tokens", is_flag=True, help="Token sequences, sampled tokens coloured.")
@click.option("--model", metavar="NAME", help="Whose tokenizer reads the tokens; default: the run's model.")
def command(
    run: Path, episode: str | None, every: bool, only: str | None, tokens: bool, model: str | None
) -> None:
    """Read the episodes in the folder RUN: a pager on a terminal, plain text in a pipe.

    EPISODE is an id from the list. Keys of the pager: n and p for the next and the previous episode, space
    and b to page, / to search, t for tokens, l for the list, q to quit.
    """
    from agentgym import journal
    from agentgym.viewer import episodes

    loaded = journal.load(run)
    found = [loaded[id] for id in sorted(loaded) if only is None or _kind(loaded[id]) == only]
    opened = _position(found, episode)
    decoder = functools.cache(lambda: _decoder(model or _model(journal.header(run))))
    console = results()
    if not found:
        console.print("no such episodes" if only else "no episodes yet")
    elif console.is_terminal and sys.stdin.isatty() and not every:
        from agentgym.viewer.pager import Pager

        Pager(found, run.name, decoder=decoder, console=console, opened=opened, tokens=tokens).run()
    elif opened is None and not every:
        show(console, episodes.index(found))
    else:
        for trajectory in found if opened is None else [found[opened]]:
            console.print(episodes.tokens(trajectory, decoder) if tokens else episodes.episode(trajectory))
            console.print()


def _kind(trajectory: Trajectory) -> str:
    if trajectory.outcome is None:
        return "running"
    if not trajectory.valid:
        return "lost"
    return "solved" if trajectory.success else "unsolved"


def _position(found: Sequence[Trajectory], episode: str | None) -> int | None:
    if episode is None:
        return None
    ids = [trajectory.id for trajectory in found]
    if episode not in ids:
        raise UnknownName("episode", episode, ids)
    return ids.index(episode)


def _model(header: Mapping[str, Any]) -> str | None:
    """The name of the model that sampled: a training run's, or an evaluation's policy."""
    if header.get("kind") == "train":
        named = header.get("config", {}).get("model", {}).get("name")
        return None if named is None else str(named)
    return header.get("policy")


def _decoder(model: str | None) -> Decode | None:
    """Text of token ids by ``model``'s tokenizer; ``None`` where it cannot be had."""
    if model is None:
        return None
    try:
        from tokenizers import Tokenizer

        from agentgym.policies.models import resolve

        # The tokenizer's file alone: importing transformers would take seconds.
        tokenizer = Tokenizer.from_file(str(resolve(model, offline=True) / "tokenizer.json"))
    except Exception:  # the library raises bare exceptions; without it there are still the ids
        return None
    return lambda ids: str(tokenizer.decode(list(ids), skip_special_tokens=False))
