"""``agentgym data``: what lies on disk, and how to make it ahead of time.

Invariant: only the cache is ever deleted, and only after the person agreed; everything in it can be rebuilt.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from agentgym import datasets, paths
from agentgym.cli.options import key_values
from agentgym.cli.output import messages, reserved_stdout, results, show, write_json
from agentgym.errors import StorageFailed, UnknownName, UsageError
from agentgym.viewer.terminal import untrusted

_UNITS = ("B", "KB", "MB", "GB", "TB")


@click.group("data")
def command() -> None:
    """Pre-generate games, get models; see and clear what lies on disk."""


@command.command("list")
@click.option("--runs", type=click.Path(path_type=Path), default=Path("runs"), help="Folder of the runs.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def list_(runs: Path, as_json: bool) -> None:
    """Show the three places on disk and how large their entries are."""
    rows = [row for place, folder in _places(runs) for row in _entries(place, folder)]
    if as_json:
        write_json(rows)
        return
    table = Table("place", "entry", "size", box=None, pad_edge=False)
    table.columns[2].justify = "right"
    for row in rows:
        table.add_row(row["place"], untrusted(row["path"]), _size(row["bytes"]))
    console = results()
    show(console, table)
    for place, folder in _places(runs):
        if not folder.is_dir():
            console.print(f"{place}: nothing at {folder}", soft_wrap=True)
    wanted = [known for name, known in sorted(datasets.known().items()) if paths.find_data(name) is None]
    if wanted:
        console.print("\n`agentgym data get NAME` obtains")
        obtainable = Table("data set", "what it is", "licence", box=None, pad_edge=False)
        for known in wanted:
            obtainable.add_row(known.name, known.summary, known.licence)
        show(console, obtainable)


@command.command("get")
@click.argument("name")
@click.option(
    "--from",
    "source",
    type=click.Path(exists=True, path_type=Path),
    help="A file or folder that is there already, in place of a download (data sets only).",
)
def get(name: str, source: Path | None) -> None:
    """Obtain NAME, a data set or a model (a hub name, or smollm2), and print its folder.

    Data sets go to the first folder of AGENTGYM_DATA, models to the cache.
    """
    if name in datasets.known():
        with reserved_stdout(), _progress(f"getting {name}") as progress:
            folder = datasets.get(name, progress, source)
    elif source is not None:
        raise UnknownName("data set", name, datasets.DATASETS)
    else:
        with reserved_stdout(), messages().status(f"getting {name}"):
            from agentgym.policies.models import resolve

            folder = resolve(name)
    click.echo(folder)


@command.group("build")
def build() -> None:
    """Make data ahead of time."""


@build.command("textworld")
@click.argument("ids", nargs=-1, metavar="[ID]...")
@click.option("--split", default="train", show_default=True, help="The split.")
@click.option("--count", type=click.IntRange(1), default=100, show_default=True, help="Games of each id.")
@click.option(
    "--seed", type=click.IntRange(0), help="The games that `eval --seed` draws, not the first ones."
)
@click.option("--env", "env_options", multiple=True, metavar="KEY=VALUE", help="Argument; repeatable.")
@click.option("--processes", type=click.IntRange(1), help="At work at once; default: the cores.")
def textworld(
    ids: tuple[str, ...],
    split: str,
    count: int,
    seed: int | None,
    env_options: tuple[str, ...],
    processes: int | None,
) -> None:
    """Generate the games of tasks of the TextWorld environments ID; of all of them if none is named."""
    import agentgym
    from agentgym.registry import base

    ids = ids or tuple(id for id in agentgym.families() if id.startswith("agentgym/TextWorld-"))
    kwargs = key_values(env_options)
    tasks = []
    for id in ids:
        env = agentgym.make(id, **kwargs)
        try:
            split_tasks = base(env).tasks(split)
            if count > len(split_tasks):
                raise UsageError(
                    f"{id} has {len(split_tasks)} tasks in {split!r}, not {count}", hint="lower --count"
                )
            chosen = split_tasks.ids[:count] if seed is None else split_tasks.sample(count, seed)
            tasks += [base(env).find_task(task_id) for task_id in chosen]
        finally:
            env.close()
    from agentgym.environments.text.textworld_games import generate

    with reserved_stdout(), _progress("games") as progress:
        made = generate(tasks, processes=processes or os.cpu_count() or 1, progress=progress)
    click.echo(f"{made} games made, {len(tasks) - made} were in the cache: {paths.cache_dir('textworld')}")


@build.command("repair")
@click.option(
    "--from",
    "source",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="A folder with the archives, in place of the package index.",
)
def repair(source: Path | None) -> None:
    """Build the instances of Repair from releases of packages, and print their folder.

    Archives are fetched and held to their hashes; what runs a line of them runs in bubblewrap. An instance
    whose tests do not tell its two releases apart on this machine is left out.
    """
    with reserved_stdout(), _progress("instances") as progress:
        folder = datasets.get("repair", progress, source)
    from agentgym.environments.code.repair_build import left_out

    for id, why in left_out(folder).items():
        messages().print(f"left out: {id}: {why}", soft_wrap=True, markup=False, highlight=False)
    click.echo(folder)


@build.command("repair-recipe")
@click.argument("package")
@click.argument("old")
@click.argument("new")
@click.option("--library", "libraries", multiple=True, help="What the tests need; repeatable.")
@click.option("--runs", type=click.IntRange(1), default=3, show_default=True, help="Of the tests, each.")
def repair_recipe(package: str, old: str, new: str, libraries: tuple[str, ...], runs: int) -> None:
    """Print the recipe of an instance of Repair: PACKAGE, from release OLD to NEW.

    The statement of the problem is left empty, for a person to write.
    """
    import asyncio

    from agentgym.environments.code.repair_archives import Index
    from agentgym.environments.code.repair_build import draft
    from agentgym.sandboxes import make_backend

    async def made() -> str:
        async with make_backend("bubblewrap") as backend:
            recipe = await draft(package, old, new, backend, Index(), libraries=libraries, runs=runs)
            return recipe.model_dump_json(indent=1)

    with reserved_stdout():
        text = asyncio.run(made())
    click.echo(text)


@command.command("clear")
@click.argument("entry", required=False)
@click.option("--yes", is_flag=True, help="Do not ask.")
def clear(entry: str | None, yes: bool) -> None:
    """Delete the cache, or its ENTRY alone (models, textworld). It is rebuilt as it is needed.

    What AgentGym did not make is left alone.
    """
    root = paths.cache_dir()
    entries = {path.name: path for path in sorted(root.iterdir()) if (path / paths.TAG).is_file()}
    if entry is not None and entry not in entries:
        raise UnknownName("entry of the cache", entry, entries, hint=f"the cache is {root}")
    doomed = list(entries.values()) if entry is None else [entries[entry]]
    if not doomed:
        click.echo(f"the cache {root} holds nothing that AgentGym made")
        return
    for path in doomed:
        click.echo(f"{path}  {_size(_bytes(path))}")
    if not yes and not sys.stdin.isatty():
        raise UsageError("nobody is there to agree to the deletion", hint="add --yes")
    if not yes and not click.confirm("delete?"):
        click.echo("nothing was deleted")
        return
    for path in doomed:
        try:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        except OSError as error:
            raise StorageFailed(f"cannot delete {error.filename}: {error.strerror}") from error
    click.echo("deleted")


@contextmanager
def _progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal; what is yielded takes what is done and what there is in all."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = messages()
    with Progress(
        TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        console=console, disable=not console.is_terminal, transient=True,
    ) as bar:  # fmt: skip
        row = bar.add_task("", total=None)
        yield lambda done, total: bar.update(row, completed=done, total=total)


def _places(runs: Path) -> Iterator[tuple[str, Path]]:
    yield "cache", paths.cache_dir()
    for folder in paths.data_path():
        yield "data", folder
    yield "runs", runs


def _entries(place: str, folder: Path) -> Iterator[dict[str, Any]]:
    if not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        yield {"place": place, "path": str(path), "bytes": _bytes(path)}


def _bytes(path: Path) -> int:
    """Disk size of a file or of everything in a folder; links are not followed."""
    if path.is_symlink() or not path.is_dir():
        return path.lstat().st_size
    return sum((Path(folder) / name).lstat().st_size for folder, _, names in os.walk(path) for name in names)


def _size(count: float) -> str:
    for unit in _UNITS:
        if count < 1000 or unit == _UNITS[-1]:
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
