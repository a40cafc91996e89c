"""``agentgym list``: what can be named.

Invariant: a family that cannot be imported is listed with what it needs; it never hides the others.
"""

from __future__ import annotations

from typing import Any

import click
from rich.table import Table

from agentgym.cli.output import results, show, write_json
from agentgym.viewer.terminal import untrusted


@click.command("list")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def command(as_json: bool) -> None:
    """Environments with their splits and sizes, policies, algorithms."""
    document = {"environments": environments(), "policies": policies(), "algorithms": algorithms()}
    if as_json:
        write_json(document)
        return
    console = results()
    table = Table(box=None, pad_edge=False)
    # An id is there to be copied: it is never cut.
    longest = max((len(row["id"]) for row in document["environments"]), default=0)
    table.add_column("environment", no_wrap=True, min_width=longest)
    table.add_column("splits (* default)")
    table.add_column("what one does there")
    for row in document["environments"]:
        table.add_row(untrusted(row["id"]), untrusted(_splits(row)), untrusted(row["summary"]))
    show(console, table)
    console.print()
    names = ", ".join(policy["name"] for policy in document["policies"])
    console.print(f"policies:    {names}, or a model: a folder, a hub name")
    named = ", ".join(row["name"] for row in document["algorithms"]) or "-"
    console.print(f"algorithms:  {named}", soft_wrap=True)
    console.print("plug-ins and import paths package.module:name are accepted wherever a name is")


def environments() -> list[dict[str, Any]]:
    """Every registered id; ``splits`` maps a split to its size and is ``None`` where ``needs`` says why."""
    import agentgym

    listed = []
    for family in agentgym.families().values():
        row: dict[str, Any] = {
            "id": family.id,
            "summary": family.summary,
            "extra": family.extra or None,
            "splits": None,
            "default_split": None,
            "needs": None,
        }
        try:
            row |= _tasks(family.id)
        except agentgym.errors.MissingDependency as error:
            row["needs"] = f"extra {error.extra}"
        except agentgym.errors.MissingData as error:
            row["needs"] = f"data: {error.hint}"
        except agentgym.errors.EnvironmentFailed as error:
            row["needs"] = f"attention: {error.message}".splitlines()[0]
        except Exception as error:
            row["needs"] = f"attention: {type(error).__name__}: {error}".splitlines()[0]
        listed.append(row)
    return listed


def policies() -> list[dict[str, Any]]:
    """The policies that have a name of their own."""
    from agentgym import plugins
    from agentgym.policies import POLICIES

    return [
        *({"name": name, "source": "built-in"} for name in POLICIES),
        *({"name": name, "source": point.value} for name, point in plugins.declared("policies").items()),
    ]


def algorithms() -> list[dict[str, Any]]:
    """The names that ``agentgym train`` takes: algorithms, and presets of them."""
    from importlib.resources import files

    from agentgym import plugins
    from agentgym.trainers import ALGORITHMS

    presets = sorted(
        path.name.removesuffix(".toml")
        for path in files("agentgym.trainers").joinpath("presets").iterdir()
        if path.name.endswith(".toml")
    )
    named = {name: "built-in" for name in ALGORITHMS}
    named |= {name: "preset" for name in presets if name not in named}
    named |= {name: point.value for name, point in plugins.declared("algorithms").items()}
    return [{"name": name, "source": source} for name, source in named.items()]


def _tasks(id: str) -> dict[str, Any]:
    import agentgym
    from agentgym.registry import base

    env = agentgym.make(id)
    try:
        family = base(env)
        return {
            "splits": {split: len(family.tasks(split)) for split in family.splits},
            "default_split": family.default_split,
        }
    finally:
        env.close()


def _splits(row: dict[str, Any]) -> str:
    if row["splits"] is None:
        return f"needs {row['needs']}"
    return ", ".join(
        f"{name}{'*' if name == row['default_split'] else ''} {size}" for name, size in row["splits"].items()
    )
