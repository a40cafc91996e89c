"""Build the instances of repository repair from releases of packages.

Invariants: archives are fetched and held to their hashes here, and whatever runs a line of them runs in a
sandbox; an instance is kept only if, on this machine, its tests tell the two releases apart as its recipe
says, and enough tests hold in both.

A built data set is a folder: ``instances.jsonl`` (records in the form of SWE-bench), ``repositories`` (a
folder for each instance, as it is before the change), ``libraries`` (unpacked wheels), ``left_out.json``
(instances that do not hold on this machine, and why).
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from agentgym import datasets
from agentgym.environments.code import repair_scoring as scoring
from agentgym.environments.code.repair_archives import Archive, Index, unpack
from agentgym.environments.code.repair_instances import Instance
from agentgym.environments.code.repair_measure import (
    Layout,
    Lists,
    Run,
    distribution,
    layout,
    lists,
    run_tests,
    search_path,
    source_change,
    test_change,
)
from agentgym.environments.code.repair_recipes import Digest, File, Recipe, Recipes, digest, recipes
from agentgym.errors import DataUnavailable, EnvironmentFailed, UsageError
from agentgym.sandboxes import Backend, make_backend

LEAST = 5
"""Fewest tests that pass before and after the change."""

MOST = 40
"""Most tests that only pass after it."""

HELD_OUT = 3
"""One package in so many is in the split ``test``; all releases of a package are in one split."""

RUNS = 3
"""How often the tests are run on each release when a recipe is made."""

PYTEST = ("pytest", "iniconfig", "pluggy", "packaging")


def obtain(folder: Path, progress: datasets.Progress, source: Path | None) -> None:
    """Build every instance of the recipes of this release, in bubblewrap.

    Args:
        folder: Where they go.
        progress: Told instances.
        source: A folder with the archives, in place of the package index.

    Raises:
        DataUnavailable: An archive cannot be had, or no instance holds on this machine.
        MissingDependency: There is no sandbox.
    """

    async def make() -> None:
        async with make_backend("bubblewrap") as backend:
            await build(folder, backend, Index(source), progress=progress)

    asyncio.run(make())


async def build(
    folder: Path,
    backend: Backend,
    index: Index,
    *,
    chosen: Recipes | None = None,
    progress: datasets.Progress = lambda done, total: None,
) -> Mapping[str, str]:
    """Build instances.

    Args:
        folder: Where they go.
        backend: Runs their tests.
        index: Gives the archives.
        chosen: The recipes; default: those of this release.
        progress: Told instances.

    Returns:
        Why instances were left out, by id.

    Raises:
        DataUnavailable: An archive cannot be had, or no instance holds on this machine.
        SandboxFailed: The machinery around a sandbox broke.
    """
    made = chosen or recipes()
    needed = {name for recipe in made.recipes for name in recipe.libraries}
    unpack_libraries(folder / "libraries", made, needed, index)
    told: dict[str, dict[str, object] | str] = {}
    free = asyncio.Semaphore(os.cpu_count() or 1)

    async def one(recipe: Recipe) -> None:
        async with free:
            told[recipe.id] = await build_one(folder, recipe, backend, index)
            progress(len(told), len(made.recipes))

    tasks = [asyncio.create_task(one(recipe)) for recipe in made.recipes]
    try:
        await asyncio.gather(*tasks)
    finally:
        # The first error ends the others; a group of tasks would wrap it.
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    built = {recipe.id: told[recipe.id] for recipe in made.recipes}
    failed = {id: why for id, why in built.items() if isinstance(why, str)}
    records = [record for record in built.values() if not isinstance(record, str)]
    if not records:
        first = next(iter(failed.values()), "none was asked for")
        raise DataUnavailable(
            f"no instance holds on this machine; the first: {first}",
            hint="look at the sandbox's Python: the recipes were made with 3.11",
        )
    text = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "instances.jsonl").write_text(text, encoding="ascii")
    (folder / "left_out.json").write_text(json.dumps(failed, indent=1) + "\n", encoding="utf-8")
    return failed


def unpack_libraries(folder: Path, made: Recipes, names: set[str], index: Index) -> None:
    """Unpack the wheels of libraries, a folder each; they are not installed, and nothing of them runs here.

    Raises:
        DataUnavailable: A wheel cannot be had.
    """
    for name in sorted(names):
        library = made.libraries[name]
        wheel = index.fetch(Archive(library.package, library.file, library.sha256))
        unpack(wheel, folder / name, strip=False)


async def build_one(folder: Path, recipe: Recipe, backend: Backend, index: Index) -> dict[str, object] | str:
    """Build one instance: its record, or why it does not hold on this machine.

    Raises:
        DataUnavailable: An archive cannot be had.
        SandboxFailed: The machinery around a sandbox broke.
    """
    where = Layout(recipe.modules, recipe.sources, recipe.tests)
    instance = await _unpacked(folder, recipe, where, backend, index)
    told, why, python = await _measured(backend, instance, where, 1)
    if told is None:
        shutil.rmtree(folder / "repositories" / recipe.id)
        return why
    missing = set(recipe.fail_to_pass) - set(told.fail_to_pass)
    kept = tuple(name for name in told.pass_to_pass if name not in recipe.unstable)
    if missing or len(kept) < LEAST:
        shutil.rmtree(folder / "repositories" / recipe.id)
        if missing:
            return f"{len(missing)} tests do not tell the releases apart here, such as {min(missing)}"
        return f"only {len(kept)} tests pass before and after"
    return {
        "instance_id": recipe.id,
        "repo": recipe.package,
        "version": recipe.old.version,
        "base_commit": instance.base_commit,
        "patch": instance.patch,
        "test_patch": instance.test_patch,
        "problem_statement": recipe.statement,
        "FAIL_TO_PASS": list(recipe.fail_to_pass),
        "PASS_TO_PASS": list(kept),
        "agentgym": {
            "split": split_of(recipe.package),
            "modules": list(recipe.modules),
            "libraries": list(recipe.libraries),
            "tests": list(recipe.tests),
            "licence": recipe.licence,
            "python": python,
            "as_recorded": digest(kept) == recipe.pass_to_pass,
        },
    }


async def draft(
    package: str,
    old: str,
    new: str,
    backend: Backend,
    index: Index,
    *,
    libraries: Sequence[str] = (),
    runs: int = RUNS,
) -> Recipe:
    """The recipe of two releases, but for the statement, which a person writes.

    Args:
        package: On the index.
        old: Version that is repaired.
        new: The version after it.
        backend: Runs the tests.
        index: Gives the archives.
        libraries: What the tests need beside pytest: names of :attr:`Recipes.libraries`, without versions.
        runs: How often the tests are run on each.

    Raises:
        UsageError: The two releases make no instance; the message says why.
        DataUnavailable: An archive cannot be had.
    """
    made = recipes()
    names = tuple(_library(made, name) for name in (*PYTEST, *libraries))
    before, after = index.source(package, old), index.source(package, new)
    with tempfile.TemporaryDirectory(prefix="agentgym-repair-") as place:
        folder = Path(place)
        unpack_libraries(folder / "libraries", made, set(names), index)
        look = folder / "look"
        unpack(index.fetch(after), look, strip=True)
        where = layout(look)
        recipe = Recipe(
            id=f"{package}-{new}",
            package=package,
            old=File(version=old, file=before.name, sha256=before.sha256),
            new=File(version=new, file=after.name, sha256=after.sha256),
            licence=_licence(look),
            python="",
            libraries=names,
            modules=where.modules,
            sources=where.sources,
            tests=where.tests,
            fail_to_pass=(),
            pass_to_pass=Digest(count=0, sha256=""),
            statement="",
        )
        if not where.tests or not where.sources:
            raise UsageError(f"the archive of {package} {new} holds no tests or no package")
        instance = await _unpacked(folder, recipe, where, backend, index)
        if not instance.patch or not instance.test_patch:
            raise UsageError(f"{package} {new} changes no tests, or nothing else")
        told, why, python = await _measured(backend, instance, where, runs)
    if told is None:
        raise UsageError(f"{package} {new} makes no instance: {why}")
    if not 1 <= len(told.fail_to_pass) <= MOST or len(told.pass_to_pass) < LEAST:
        raise UsageError(
            f"{package} {new} makes no instance: {len(told.fail_to_pass)} tests pass only after the change, "
            f"and {len(told.pass_to_pass)} before and after",
            hint=f"1 to {MOST}, and at least {LEAST}, are wanted",
        )
    return recipe.model_copy(
        update={
            "python": python,
            "fail_to_pass": told.fail_to_pass,
            "pass_to_pass": digest(told.pass_to_pass),
            "unstable": told.unstable,
        }
    )


def left_out(folder: Path) -> dict[str, str]:
    """Why instances of a built data set were left out, by id.

    Raises:
        DataUnavailable: The data set is damaged.
    """
    try:
        made = json.loads((folder / "left_out.json").read_text(encoding="utf-8"))
        return {str(id): str(why) for id, why in made.items()}
    except (OSError, ValueError, AttributeError) as error:
        raise DataUnavailable(
            f"the data set in {folder} is damaged: {error}",
            hint="remove it and build it again: agentgym data build repair",
        ) from error


def split_of(package: str) -> str:
    """The split of a package's instances."""
    return "train" if int(digest([package]).sha256, 16) % HELD_OUT else "test"


async def _unpacked(folder: Path, recipe: Recipe, where: Layout, backend: Backend, index: Index) -> Instance:
    """The older release as a folder, and the two patches."""
    repository = folder / "repositories" / recipe.id
    archives = [Archive(recipe.package, file.file, file.sha256) for file in (recipe.old, recipe.new)]
    with tempfile.TemporaryDirectory(prefix="agentgym-repair-") as place:
        newer = Path(place)
        for archive, into in zip(archives, (repository, newer), strict=True):
            # Tens of megabytes at the most, but the event loop has other work.
            path = await asyncio.to_thread(index.fetch, archive)
            await asyncio.to_thread(unpack, path, into, strip=True)
        for name, content in distribution(repository, recipe.package, recipe.old.version).items():
            (repository / name).parent.mkdir(exist_ok=True)
            (repository / name).write_bytes(content)
        source, tests = source_change(repository, newer, where), test_change(repository, newer, where)
    instance = Instance(
        id=recipe.id,
        repo=recipe.package,
        version=recipe.old.version,
        statement=recipe.statement,
        patch="",
        test_patch="",
        fail_to_pass=(),
        pass_to_pass=(),
        folder=repository,
        modules=recipe.modules,
        libraries=recipe.libraries,
        tests=recipe.tests,
    )
    base, patch = await _patch(backend, instance, source)
    _, test_patch = await _patch(backend, instance, tests)
    return replace(instance, base_commit=base, patch=patch, test_patch=test_patch)


async def _patch(backend: Backend, instance: Instance, change: Mapping[str, bytes | None]) -> tuple[str, str]:
    """The commit of the repository, and a change of it as git writes it."""
    async with await backend.start(scoring.spec_of(instance), owner="repair build") as sandbox:
        base = await scoring.prepare(sandbox, instance)
        for path, content in change.items():
            if content is None:
                await sandbox.exec(["rm", "-f", "--", path])
            else:
                await sandbox.write(path, content)
        patch, why = await scoring.take_patch(sandbox, base)
    if why:
        raise EnvironmentFailed(f"the change of {instance.id} cannot be written as a patch: {why}")
    return base, patch.decode("utf-8", "surrogateescape")


async def _measured(
    backend: Backend, instance: Instance, where: Layout, runs: int
) -> tuple[Lists | None, str, str]:
    """The lists of tests, or why there are none, and the version of the Python that ran them."""
    told: dict[bool, list[Run]] = {False: [], True: []}
    for _ in range(runs):
        for repaired, made in told.items():
            async with await backend.start(scoring.spec_of(instance), owner="repair build") as sandbox:
                await scoring.prepare(sandbox, instance)
                patches = [instance.patch] * repaired + [instance.test_patch]
                if why := await scoring.lay(sandbox, patches):
                    return None, why, ""
                path = search_path(instance.modules, instance.libraries)
                run = await run_tests(sandbox, path=path, tests=where.tests)
            if not run.finished:
                return None, f"the tests do not come to an end: {run.output[-300:]}", run.python
            made.append(run)
    return lists(told[False], told[True]), "", told[True][0].python


def _library(made: Recipes, name: str) -> str:
    folded = re.sub(r"[-_.]+", "-", name).lower()
    for known, library in made.libraries.items():
        if re.sub(r"[-_.]+", "-", library.package).lower() == folded:
            return known
    raise UsageError(f"no library {name!r} is recorded", hint="add its wheel to repair_recipes.json")


def _licence(root: Path) -> str:
    """What an archive says of its licence; a person checks it."""
    described = root / "PKG-INFO"
    text = described.read_text("utf-8", "replace") if described.is_file() else ""
    for pattern in (r"^License-Expression: (.+)$", r"^Classifier: License :: (?:OSI Approved :: )?(.+)$",
                    r"^License: (.+)$"):  # fmt: skip
        if match := re.search(pattern, text, re.M):
            return match[1].strip()
    return ""
