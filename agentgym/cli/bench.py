"""``agentgym bench``: measure speed on this machine.

Invariant: the benchmarks are part of a source checkout, not of the package; without one this says so.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
from rich.table import Table
from rich.text import Text

from agentgym.cli.output import results, show, write_json
from agentgym.errors import AgentGymError, UsageError
from agentgym.viewer.terminal import untrusted

_VERDICTS = {True: ("ok", "green"), False: ("missed", "red"), None: ("not measured", "yellow")}


@click.group("bench")
def command() -> None:
    """Measure speed on this machine."""


@command.command("core")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def core(as_json: bool) -> None:
    """Engine and journal, TextWorld, the transformers policy, the import: figures beside their targets."""
    _show(_run(_checkout() / "core.py"), as_json)


@command.command("environments")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def environments(as_json: bool) -> None:
    """Environments beside the packages that they come from, and the OpenEnv server."""
    _show(_run(_checkout() / "environments.py"), as_json)


@command.command("sandboxes")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def sandboxes(as_json: bool) -> None:
    """Sandboxes: how long they take to start, to run a command, to fork; docker's exec beside ours."""
    _show(_run(_checkout() / "sandboxes.py"), as_json)


@command.command("learning", context_settings={"ignore_unknown_options": True})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def learning(arguments: tuple[str, ...]) -> None:
    """Learning studies, several seeds an arm: hours. STUDY … names some, --report runs nothing."""
    script = _checkout() / "learning" / "run.py"
    done = subprocess.run([sys.executable, "-P", str(script), *arguments], check=False)
    if done.returncode != 0:
        raise AgentGymError("not all runs ended well", hint="call it again: what is finished is not repeated")


@command.command("training")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def training(as_json: bool) -> None:
    """Updates beside TRL's, which `make peers` installs: speed, memory, entropies, IGPO's scoring."""
    _show(_run(_checkout() / "training.py"), as_json)


def _show(report: dict[str, Any], as_json: bool) -> None:
    if as_json:
        write_json(report)
        return
    table = Table("figure", box=None, pad_edge=False)
    for name in ("measured", "target"):
        table.add_column(name, justify="right")
    table.add_column()
    for figure in report["figures"]:
        verdict, style = _VERDICTS[figure["ok"]]
        value = figure["value"]
        table.add_row(
            figure["name"],
            "-" if value is None else f"{value:.3g} {figure['unit']}",
            f"{figure['bound']} {figure['limit']:g}",
            Text(verdict, style=style),
        )
    console = results()
    show(console, table)
    for error in dict.fromkeys(figure["error"] for figure in report["figures"] if "error" in figure):
        console.print(untrusted(error, "yellow"))
    machine = report["machine"]
    console.print(
        f"\n{machine['cpu'] or machine['system']}, {machine['cores']} cores, Python {machine['python']}, "
        f"load {machine['load']} at the end. Other load makes wall times larger; the ratios hold.",
        soft_wrap=True,
    )


def _checkout() -> Path:
    """The benchmarks of the checkout that this package runs from.

    Raises:
        UsageError: It runs from an installed package.
    """
    import agentgym

    folder = Path(agentgym.__file__).resolve().parent.parent / "benchmarks"
    if not (folder / "core.py").is_file():
        raise UsageError(
            "the benchmarks are not installed with the package",
            hint="clone the repository, then `make install` and `.venv/bin/agentgym bench core` there",
        )
    return folder


def _run(script: Path) -> dict[str, Any]:
    # -P: the benchmarks' folder must not shadow packages of the same names.
    done = subprocess.run([sys.executable, "-P", str(script)], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise AgentGymError(f"{script} failed with exit code {done.returncode}", hint="its output is above")
    report: dict[str, Any] = json.loads(done.stdout)
    return report
