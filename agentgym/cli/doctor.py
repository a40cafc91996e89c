"""``agentgym doctor``: what this machine can run, and for what it cannot, the one command that fixes it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click
from rich.table import Table
from rich.text import Text

from agentgym.cli.output import messages, reserved_stdout, results, show, write_json
from agentgym.errors import MissingDependency, ModelUnavailable

_STYLES = {"ok": "green", "limited": "yellow", "missing": "red"}


@click.group("doctor", invoke_without_command=True)
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
@click.option("--network/--no-network", default=True, help="Ask whether the model hub can be reached.")
@click.pass_context
def command(context: click.Context, as_json: bool, network: bool) -> None:
    """What this machine can run, and what to do about the rest."""
    if context.invoked_subcommand is not None:
        return
    from agentgym.cli.machine import examine

    findings = examine(network=network)
    if as_json:
        write_json([dataclasses.asdict(finding) for finding in findings])
        return
    console = results()
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        found = Text(finding.detail)
        if finding.fix:
            found.append(f"\n→ {finding.fix}", style="bold")
        table.add_row(Text(finding.state, style=_STYLES[finding.state]), finding.name, found)
    show(console, table)
    missing = [finding.name for finding in findings if finding.state == "missing"]
    console.print(
        f"\n{len(missing)} missing: {', '.join(missing)}. What does not need them runs."
        if missing
        else "\nNothing is missing."
    )


@command.command("template")
@click.argument("model")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def template(model: str, as_json: bool) -> None:
    """Say whether MODEL's chat template keeps its prefix, and which turns fork."""
    with reserved_stdout(), messages().status(f"reading the template of {model}"):
        from agentgym.policies import models, templates

        tokenizer = _tokenizer(models.resolve(model))
        report = templates.diagnose(templates.HuggingFaceRenderer(tokenizer))
    if as_json:
        write_json(report.to_json())
        return
    console = results()
    console.print(report.name, style="bold")
    for line in report.lines():
        console.print(f"  {line}", soft_wrap=True)


def _tokenizer(folder: Path) -> Any:
    try:
        from transformers import AutoTokenizer
    except ModuleNotFoundError as error:
        raise MissingDependency("transformers", "train") from error
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise ModelUnavailable(
            f"the tokenizer in {folder} cannot be loaded: {str(error).splitlines()[0]}",
            hint="the folder needs tokenizer.json and tokenizer_config.json",
        ) from error
