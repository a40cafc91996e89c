"""``agentgym train``: train a policy, or go on with an interrupted run."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Mapping
from pathlib import Path

import click
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from agentgym.cli.root import resumable
from agentgym.errors import UsageError
from agentgym.redaction import redact
from agentgym.trajectory import Trajectory

_COLUMNS = {
    "step": None,
    "success": "success",
    "reward": "score/mean",
    "loss": "loss/total",
    "grad": "grad_norm",
    "KL": "approx_kl",
    "valid": "valid_action_ratio",
    "turns": "turns/mean",
    "failed": "infra_failed",
    "eval": "eval/success",
    "tok/s": "tokens_per_second",
    "s": "step_seconds",
}


@click.command("train")
@click.argument("name", required=False)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--config", "files", multiple=True, type=click.Path(path_type=Path), help="TOML file; repeatable."
)
@click.option(
    "--with",
    "added",
    metavar="METHOD,…",
    default="",
    help="Combine with these methods: gigpo, ppo, igpo, spear, epo.",
)
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the run; default runs/NAME-TIME.")
@click.option("--resume", type=click.Path(path_type=Path), help="Go on with the run in this folder.")
@click.option("--dry-run", is_flag=True, help="Print the resolved config as JSON and stop.")
@click.option("--quiet", is_flag=True, help="No live table.")
def command(
    name: str | None,
    overrides: tuple[str, ...],
    files: tuple[Path, ...],
    added: str,
    out: Path | None,
    resume: Path | None,
    dry_run: bool,
    quiet: bool,
) -> None:
    """Train with the preset or algorithm NAME: agentgym train grpo env=ID model=MODEL optimiser.lr=1e-6."""
    from agentgym.trainers import launch

    if resume is not None:
        # The first word is no name here: only the secrets, which no run saves, are given again.
        given = (name, *overrides) if name else ()
        if files or out or added or (name and "=" not in name):
            raise UsageError(
                "--resume takes the saved config; it goes with no name, --config, --with or --out",
                hint=f"agentgym train --resume {resume}",
            )
        algorithm, config = launch.reopen(resume, given)
        folder = resume
    else:
        if name is None:
            raise UsageError(
                "no algorithm named", hint=f"one of: {', '.join([*launch.presets(), 'cloning'])}"
            )
        algorithm, config = launch.resolve(
            name, files, overrides, [method.strip() for method in added.split(",") if method.strip()]
        )
        stamp = time.strftime("%Y%m%d-%H%M%S")
        folder = out or Path("runs") / f"{name.replace(':', '-')}-{stamp}"
    if dry_run:
        click.echo(json.dumps(redact(config.model_dump(mode="json")), indent=2))
        return
    watch = Watch(config.steps, str(folder), quiet=quiet)
    with watch, resumable(f"agentgym train --resume {shlex.quote(str(folder))}", folder):
        model = launch.launch(algorithm, config, folder, resume=resume is not None, progress=watch)
    click.echo(f"model:    {model}")
    click.echo(f"episodes: agentgym view {folder}")
    click.echo(f"evaluate: agentgym eval --like {folder} --policy {model}")


class Watch:
    """A live table of steps with progress, success, tokens a second and time left, on stderr.

    Args:
        steps: Length of the run.
        title: Shown above the table.
        quiet: Show nothing.
        rows: Number of steps that stay visible.
    """

    def __init__(self, steps: int, title: str, *, quiet: bool = False, rows: int = 12) -> None:
        self._console = Console(stderr=True, quiet=quiet)
        self._title, self._rows = title, rows
        self._lines: list[list[str]] = []
        self._phase, self._phase_since = "starting", time.monotonic()
        self._told: set[str] = set()
        self._episodes = self._turns = self._tokens = 0
        self._step_since = time.monotonic()
        self._bar = Progress(
            TextColumn("[bold]steps"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            console=self._console,
        )  # fmt: skip
        self._task = self._bar.add_task("steps", total=steps)
        self._live = Live(
            console=self._console, get_renderable=self._render, refresh_per_second=2, transient=False
        )

    def __enter__(self) -> Watch:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._live.stop()

    def phase(self, text: str) -> None:
        """What is being done now."""
        self._phase, self._phase_since = text, time.monotonic()
        # Without a terminal each is told once: a log does not need two lines a step.
        if not self._console.is_terminal and text not in self._told:
            self._told.add(text)
            self._console.print(Text(text))

    def turn(self, trajectory: Trajectory) -> None:
        """Count a finished turn."""
        self._turns += 1
        start, end = trajectory.turns[-1].span
        self._tokens += end - start

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add a finished step."""
        now = time.monotonic()
        seconds, self._step_since = now - self._step_since, now
        own = {
            **metrics,
            "step_seconds": seconds,
            "tokens_per_second": (metrics.get("tokens", 0.0) + self._tokens) / max(seconds, 1e-9),
        }
        self._turns = self._tokens = 0
        line = [str(step + 1), *(_number(own.get(k)) for k in list(_COLUMNS.values())[1:] if k is not None)]
        self._lines.append(line)
        self._bar.update(self._task, completed=step + 1)
        if not self._console.is_terminal:
            told = (f"{title} {value}" for title, value in zip(_COLUMNS, line, strict=True) if value)
            self._console.print(Text("  ".join(told)))

    def _render(self) -> Group:
        table = Table(title=self._title, title_justify="left", header_style="bold", padding=(0, 1))
        for title in _COLUMNS:
            table.add_column(title, justify="right")
        for line in self._lines[-self._rows :]:
            table.add_row(*line)
        seconds = time.monotonic() - self._phase_since
        now = Text(f"{self._phase}  {seconds:.0f} s  {self._turns} turns, {self._tokens} tokens sampled")
        return Group(table, self._bar, now)


def _number(value: float | None) -> str:
    if value is None:
        return ""
    if value == int(value) and abs(value) < 1e6:
        return str(int(value))
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
