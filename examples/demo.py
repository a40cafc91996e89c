"""A real language model gets better at real text games, by AgentGym's own commands.

SmolLM2-135M-Instruct plays TextWorld's coin collector: untouched, after behaviour cloning that is stopped
early, and after GRPO, each time on the same 100 games that no training saw. ``make demo`` runs it. Every
command is printed before it runs; each is a process of its own, so each can be tried alone.
"""

from __future__ import annotations

import argparse
import json
import resource
import shlex
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

ENV = "agentgym/TextWorld-CoinCollector-v0"
LEVEL = 3
GAMES = {"train": 60, "valid": 48, "test": 100}
HERE = Path(__file__).parent
console = Console(stderr=True)


def main() -> None:
    """Prepare, then learn and measure against the clock."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs") / time.strftime("demo-%Y%m%d-%H%M%S"))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    out, seed = arguments.out, f"seed={arguments.seed}"
    started = time.monotonic()
    model = prepare(arguments.seed)
    console.print(f"model and games are at hand after {time.monotonic() - started:.0f} s")

    started = time.monotonic()
    cloning, grpo = out / "cloning", out / "grpo"
    stages = {"untouched": out / "eval-untouched", "cloned, stopped early": out / "eval-cloned"}
    stages["after GRPO"] = out / "eval-grpo"
    untouched, cloned, trained = stages.values()
    test = ["eval", "--split", "test", "--episodes", str(GAMES["test"]), "--concurrency", "48"]
    prompt = ["--layout", "turn", "--history", "4", "--history-actions", "--list-actions"]
    prompt += ["--max-turns", "4", "--max-tokens", "8"]
    prompt += ["--system", "You play a text game. Answer with one action from the list."]

    agentgym(*test, ENV, "--env", f"level={LEVEL}", *prompt, "--policy", model, "--out", untouched)
    settings = ["--config", HERE / "demo-cloning.toml", f"model={model}", seed]
    agentgym("train", "cloning", *settings, "--out", cloning)
    agentgym(*test, "--like", untouched, "--policy", cloning / "model", "--out", cloned)
    settings = ["--config", HERE / "demo.toml", f"model={cloning / 'model'}", seed]
    agentgym("train", "grpo", *settings, "--out", grpo)
    agentgym(*test, "--like", untouched, "--policy", grpo / "model", "--out", trained, "--against", cloned)
    tell(stages, out, time.monotonic() - started)


def prepare(seed: int) -> str:
    """Fetch and convert the model, and generate every game that will be played; both are cached."""
    from agentgym.environments.text.textworld_games import generate
    from agentgym.policies import models
    from agentgym.registry import base, make

    name = "SmolLM2-135M-Instruct"
    with console.status(f"{name}: download and conversion, once"):
        models.resolve(name)
    env = make(ENV, level=LEVEL)
    family = base(env)
    drawn = [
        *family.tasks("valid").sample(GAMES["valid"], seed),
        *family.tasks("test").sample(GAMES["test"], 0),
    ]
    wanted = [*family.tasks("train")[: GAMES["train"]], *map(family.find_task, drawn)]
    env.close()
    columns = (TextColumn("making games"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=len(wanted))
        generate(wanted, processes=2, progress=lambda done, _: bar.update(task, completed=done))
    return name


def agentgym(*words: str | Path) -> None:
    """Run one command of AgentGym; leave with its exit code if it fails."""
    command = [str(word) for word in words]
    console.print(f"\n$ agentgym {shlex.join(command)}", style="bold", markup=False, highlight=False)
    try:
        done = subprocess.run([sys.executable, "-m", "agentgym.cli", *command], check=False)
    except KeyboardInterrupt:  # the command has said what resumes it
        sys.exit(130)
    if done.returncode:
        sys.exit(done.returncode)


def tell(stages: dict[str, Path], out: Path, seconds: float) -> None:
    """The result, on the terminal and in ``report.md``."""
    table = Table(title=f"SmolLM2-135M-Instruct, {GAMES['test']} unseen games", title_justify="left")
    columns = ("model", "success", "95 % interval", "turns")
    for column in columns:
        table.add_column(column)
    lines = ["# Demo", "", f"| {' | '.join(columns)} |", "|---|---|---|---|"]
    for name, folder in stages.items():
        report = json.loads((folder / "report.json").read_text())
        low, high = report["success"]["ci95"]
        success, turns = report["success"]["mean"], report["turns"]["mean"]
        row = (name, f"{success:.0%}", f"{low:.0%} to {high:.0%}", f"{turns:.1f}")
        table.add_row(*row)
        lines.append(f"| {' | '.join(row)} |")
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    told = f"{seconds:.0f} s of training and evaluation, {peak:.1f} GiB at the peak"
    (out / "report.md").write_text("\n".join([*lines, "", told, ""]))
    console.print(table)
    console.print(told)
    console.print(f"report:   {out / 'report.md'}\nepisodes: .venv/bin/agentgym view {stages['after GRPO']}")


if __name__ == "__main__":
    main()
