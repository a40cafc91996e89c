"""``agentgym check``: hold an environment to the contract."""

from __future__ import annotations

import click
from rich.table import Table
from rich.text import Text

from agentgym.cli.options import key_values
from agentgym.cli.output import messages, reserved_stdout, results, show, write_json
from agentgym.viewer.terminal import untrusted

_MARKS = {True: ("ok", "green"), False: ("broken", "red"), None: ("-", "yellow")}


@click.command("check")
@click.argument("id")
@click.option("--env", "env_options", multiple=True, metavar="KEY=VALUE", help="Argument; repeatable.")
@click.option("--episodes", type=click.IntRange(1), default=3, show_default=True, help="Tasks sampled.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of everything drawn.")
@click.option("--seconds", type=click.FloatRange(1), default=300.0, show_default=True, help="Budget.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def command(
    id: str, env_options: tuple[str, ...], episodes: int, seed: int, seconds: float, as_json: bool
) -> None:
    """Check the environment ID, or package.module:Class, by using it; exit with 1 if it breaks the contract.

    Spaces, seeding and determinism by replay, garbage actions, independence of forks, closing twice, leaks,
    private fields.
    """
    with reserved_stdout(), messages().status(f"checking {id}"):
        from agentgym.check import check

        report = check(id, kwargs=key_values(env_options), episodes=episodes, seed=seed, seconds=seconds)
    if as_json:
        write_json(report.to_json())
    else:
        table = Table(show_header=False, box=None, pad_edge=False)
        for finding in report.findings:
            mark, style = _MARKS[finding.ok]
            # What an environment raised or answered is quoted here.
            detail = untrusted(finding.detail)
            if finding.ok is False and finding.hint:
                detail.append_text(untrusted(f"\n→ {finding.hint}", "bold"))
            table.add_row(Text(mark, style=style), finding.name, detail)
        console = results()
        show(console, table)
        broken = sum(finding.ok is False for finding in report.findings)
        verdict = f"{broken} broken" if broken else "keeps the contract"
        console.print(f"\n{report.env}: {verdict} ({report.seconds:.1f} s)", soft_wrap=True)
    if not report.ok:
        raise SystemExit(1)
