"""Learning studies: which arms are compared on which environment, and the runs that this takes.

Invariant: a run is named by study, arm and seed, and is started from its study's file alone; one that was
interrupted goes on where it stopped, and one that is finished is not done again. One that was started with
other settings is neither gone on with nor counted. Arms of a study share the model they start from, the
seeds, the order of tasks and the number of episodes.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from agentgym.errors import AgentGymError, UsageError

HERE = Path(__file__).parent
# Settings that name a place below the study's folder.
_PLACES = frozenset({"model.name", "env.kwargs.questions", "env.kwargs.corpus"})


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        name: Of the arm.
        preset: What ``agentgym train`` runs.
        added: Methods for ``--with``.
        settings: ``a.b=value``, after the study's.
    """

    name: str
    preset: str
    added: tuple[str, ...]
    settings: tuple[str, ...]


START = Arm("start", "pocket", (), ())


@dataclass(frozen=True)
class Study:
    """A comparison.

    Attributes:
        name: Of its file.
        title: The question, for a person.
        environment: What it is played on, and why, for a person.
        seeds: Of the runs that count; tuning uses others.
        start: Settings of ``agentgym train pocket``, which makes the model that every arm starts from.
        settings: Of every arm.
        arms: By name.
        pairs: ``(arm, base)``: what is compared.
        facts: Of the world of `facts.write`, for SearchQA; empty: none.
    """

    name: str
    title: str
    environment: str
    seeds: tuple[int, ...]
    start: tuple[str, ...]
    settings: tuple[str, ...]
    arms: dict[str, Arm]
    pairs: tuple[tuple[str, str], ...]
    facts: dict[str, int]


def studies(folder: Path = HERE) -> dict[str, Study]:
    """Every study of a folder, by name."""
    return {path.stem: read(path) for path in sorted(folder.glob("*.toml"))}


def read(path: Path) -> Study:
    """A study's file.

    Raises:
        KeyError: A pair names an arm that there is not, or a field is missing.
    """
    table = tomllib.loads(path.read_text())
    arms = {
        name: Arm(name, arm["preset"], tuple(arm.get("with", ())), tuple(arm.get("settings", ())))
        for name, arm in table["arms"].items()
    }
    pairs = tuple((arm, base) for arm, base in table["pairs"])
    for name in (name for pair in pairs for name in pair):
        if name not in arms:
            raise KeyError(f"{path.name}: a pair names {name!r}, arms are {', '.join(arms)}")
    return Study(
        path.stem,
        table["title"],
        table["environment"],
        tuple(table["seeds"]),
        tuple(table["start"]),
        tuple(table["settings"]),
        arms,
        pairs,
        table.get("facts", {}),
    )


def run(
    study: Study,
    root: Path,
    *,
    seeds: Sequence[int] | None = None,
    at_once: int | None = None,
    extra: Sequence[str] = (),
    tell: Callable[[str], None] = lambda text: None,
) -> dict[tuple[str, int], str]:
    """Do all runs that are not done, one to a core.

    Args:
        study: What to run.
        root: Folder of the studies' runs; each has ``start`` and ``arm/seed`` there.
        seeds: Others than the study's.
        at_once: Runs at once; by default one a core.
        extra: Settings laid over the arms' (a smoke run's); ``start.a=value`` over the model's.
        tell: Called with a line for a person.

    Returns:
        By arm and seed why a run failed; its log lies beside its folder.
    """
    folder = root / study.name
    try:
        study = prepare(study, folder)
    except UsageError as error:
        return {("facts", 0): str(error)}
    start = folder / START.name
    own = [setting.removeprefix("start.") for setting in extra if setting.startswith("start.")]
    if problem := _train(START, [*study.start, *own], start, tell):
        return {("start", 0): problem}
    jobs = [(arm, seed) for seed in (seeds or study.seeds) for arm in study.arms.values()]
    failed: dict[tuple[str, int], str] = {}

    def one(job: tuple[Arm, int]) -> None:
        arm, seed = job
        out = folder / arm.name / str(seed)
        settings = [*study.settings, *arm.settings, *(e for e in extra if not e.startswith("start."))]
        if problem := _train(arm, [f"model={start / 'model'}", *settings, f"seed={seed}"], out, tell):
            failed[arm.name, seed] = problem

    with ThreadPoolExecutor(at_once or os.cpu_count() or 1) as pool:
        list(pool.map(one, jobs))
    return failed


def prepare(study: Study, folder: Path) -> Study:
    """Write the files that a study's environment reads, and name them in its settings.

    Raises:
        UsageError: They are there, and others.
    """
    if not study.facts:
        return study
    import facts

    place = (folder / "facts").resolve()
    place.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".facts-", dir=place.parent) as made:
        facts.write(Path(made) / "facts", **study.facts)
        if not place.exists():
            (Path(made) / "facts").rename(place)
        elif any(
            one.read_bytes() != (place / one.name).read_bytes() for one in Path(made, "facts").iterdir()
        ):
            raise UsageError(
                f"the runs in {folder} are about other facts than the study's",
                hint="choose another --runs, or delete them",
            )
    files = tuple(f'env.kwargs.{name}="{place / name}.jsonl"' for name in ("questions", "corpus"))
    return replace(study, start=(*study.start, *files), settings=(*study.settings, *files))


def changed(out: Path, arm: Arm, settings: Sequence[str]) -> str:
    """What of the run in ``out`` is not as ``arm`` would be started; empty where all is, and without a run.

    Where the model and the facts lie is the study's folder, which may have been moved: that does not count.
    """
    if not (out / "journal.agj").exists():
        return ""
    from agentgym.trainers import launch

    try:
        there = _flat(launch.reopen(out)[1].model_dump())
        here = _flat(launch.resolve(arm.preset, (), ["model=", *settings], arm.added)[1].model_dump())
    except AgentGymError as error:
        return str(error)
    names = sorted({*there, *here} - _PLACES)
    differ = [name for name in names if there.get(name) != here.get(name)]
    return ", ".join(f"{name} is {there.get(name)} there and {here.get(name)} here" for name in differ)


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def _train(arm: Arm, settings: Sequence[str], out: Path, tell: Callable[[str], None]) -> str:
    """Train, or go on training; return why it failed, or nothing."""
    if why := changed(out, arm, settings):
        return f"the run in {out} was started with other settings: {why}; choose another --runs, or delete it"
    if (out / "model" / "config.json").exists():
        return ""
    out.parent.mkdir(parents=True, exist_ok=True)
    if (out / "journal.agj").exists():
        command = ["train", "--resume", str(out)]
    else:
        added = ["--with", ",".join(arm.added)] if arm.added else []
        command = ["train", arm.preset, *added, *settings, "--out", str(out)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    started = time.perf_counter()
    with out.with_name(f"{out.name}.log").open("a") as log:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "agentgym.cli", *command],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env, check=False,
        )  # fmt: skip
    name = f"{out.parent.parent.name}/{out.parent.name}/{out.name}"
    tell(f"{name}: {'failed' if done.returncode else 'done'} in {time.perf_counter() - started:.0f} s")
    return f"exit code {done.returncode}, see {out}.log" if done.returncode else ""


def curve(out: Path) -> list[tuple[int, float]]:
    """``(step, success)`` of a run's evaluations."""
    from agentgym.trainers.metrics import load

    found = load(out) if (out / "metrics.jsonl").exists() else {}
    return [
        (step, float(value))
        for step, metrics in sorted(found.items())
        if (value := metrics.get("eval/success")) is not None
    ]


def results(
    study: Study, root: Path, tell: Callable[[str], None] = lambda text: None
) -> dict[str, dict[int, list[tuple[int, float]]]]:
    """Curves by arm and seed of the runs that are finished; ``tell`` is told which are left out, and why."""
    folder = root / study.name
    found: dict[str, dict[int, list[tuple[int, float]]]] = {name: {} for name in study.arms}
    if why := changed(folder / START.name, START, study.start):
        tell(f"{study.name} is left out: in {START.name}, {why}")
        return found
    for name, arm in study.arms.items():
        for seed in study.seeds:
            out = folder / name / str(seed)
            if not (out / "model").exists():
                continue
            if why := changed(out, arm, [*study.settings, *arm.settings, f"seed={seed}"]):
                tell(f"{study.name}/{name}/{seed} is left out: {why}")
            elif points := curve(out):
                found[name][seed] = points
    return found
