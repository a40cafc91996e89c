"""A real language model gets better at real text games.

SmolLM2-135M-Instruct plays TextWorld's coin collector: untouched, after behaviour cloning that is stopped
early, and after GRPO, each time on the same 100 games that no training saw. Run it with ``make demo``.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from agentgym.cli.train import Watch
from agentgym.evaluation.report import Report
from agentgym.evaluation.run import EvaluationConfig, evaluate
from agentgym.policies import models
from agentgym.policies.transformers import TransformersPolicy
from agentgym.registry import base, make
from agentgym.trainers import launch

SETTINGS = Path(__file__).with_name("demo.toml")
TEST_GAMES = 100
console = Console(stderr=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs") / time.strftime("demo-%Y%m%d-%H%M%S"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings of the GRPO phase"
    )
    arguments = parser.parse_args()
    out, seed = arguments.out, [f"seed={arguments.seed}"]
    prepared = time.monotonic()
    with console.status("SmolLM2-135M-Instruct: download and conversion, once"):
        untouched = models.resolve("SmolLM2-135M-Instruct")
    _, cloning = launch.resolve("cloning", [SETTINGS.with_name("demo-cloning.toml")], seed)
    _, grpo = launch.resolve(
        "grpo", [SETTINGS], [f"model={out / 'cloning' / 'model'}", *seed, *arguments.set]
    )
    make_games(cloning, grpo)
    console.print(f"Everything is at hand after {time.monotonic() - prepared:.0f} s. Now the clock runs.")

    started = time.monotonic()
    reports: dict[str, Report] = {}
    reports["untouched"] = play(str(untouched), grpo, out / "eval-untouched")
    cloned = learn("cloning", cloning, out / "cloning")
    reports["after cloning, stopped early"] = play(str(cloned), grpo, out / "eval-cloned")
    trained = learn("grpo", grpo, out / "grpo")
    reports["after GRPO"] = play(str(trained), grpo, out / "eval-grpo")
    tell(reports, out, time.monotonic() - started)


def make_games(*configs) -> None:
    """Generate every game that the demo plays, in parallel; the cache keeps them."""
    from agentgym.environments.text.textworld_games import generate

    section = configs[0].env
    env = make(section.id, **section.kwargs)
    family = base(env)
    wanted = [
        *family.tasks("train")[: max(c.env.tasks for c in configs)],
        *(
            family.find_task(t)
            for t in family.tasks("valid").sample(configs[0].evaluation.episodes, configs[0].seed)
        ),
        *(family.find_task(t) for t in family.tasks("test").sample(TEST_GAMES, 0)),
    ]
    env.close()
    columns = (TextColumn("making games"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=len(wanted))
        generate(wanted, processes=2, progress=lambda done, _: bar.update(task, completed=done))


def play(model: str, config, out: Path) -> Report:
    """Success on the test games, greedy."""
    policy = TransformersPolicy(model, max_batch=config.rollout.concurrency)
    columns = (
        TextColumn(f"playing {TEST_GAMES} unseen games"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    try:
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task("", total=TEST_GAMES)
            report = evaluate(
                config.env.stack(),
                policy,
                EvaluationConfig("test", TEST_GAMES, rollout=config.rollout.engine(0, temperature=0.0)),
                out=out,
                on_episode=lambda _: bar.advance(task),
            )
    finally:
        asyncio.run(policy.aclose())
    low, high = interval(report)
    console.print(f"{out.name}: success {report.success.mean:.0%}, 95 % interval {low:.0%} to {high:.0%}")
    return report


def learn(name: str, config, out: Path) -> Path:
    """One training run; the folder of its model."""
    algorithm, _ = launch.resolve(name, [], [f"env={config.env.id}", f"model={config.model.name}"])
    with Watch(config.steps, str(out)) as watch:
        return launch.launch(algorithm, config, out, progress=watch)


def interval(report: Report) -> tuple[float, float]:
    """The 95 % interval of the success rate."""
    assert report.success is not None
    return report.success.low, report.success.high


def tell(reports: dict[str, Report], out: Path, seconds: float) -> None:
    """The result, on the terminal and in ``report.md``."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    table = Table(title="SmolLM2-135M-Instruct on 100 unseen TextWorld games", title_justify="left")
    for column in ("model", "success", "95 % interval", "turns"):
        table.add_column(column)
    lines = ["# Demo", "", "| model | success | 95 % interval | turns |", "|---|---|---|---|"]
    for name, report in reports.items():
        low, high = interval(report)
        row = (name, f"{report.success.mean:.0%}", f"{low:.0%} to {high:.0%}", f"{report.turns:.1f}")
        table.add_row(*row)
        lines.append(f"| {' | '.join(row)} |")
    told = f"{seconds:.0f} s of evaluation and training, {peak:.1f} GiB at the peak"
    (out / "report.md").write_text("\n".join([*lines, "", told, ""]))
    (out / "report.json").write_text(json.dumps({k: r.to_json() for k, r in reports.items()}, indent=2))
    console.print(table)
    console.print(
        f"{told}\nreport:   {out / 'report.md'}\nepisodes: .venv/bin/agentgym view {out / 'eval-grpo'}"
    )


if __name__ == "__main__":
    main()
