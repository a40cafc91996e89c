"""The shell tasks by id, and their scripts as a sandbox gets them.

Invariant: what a task is made of and judged by runs in sandboxes only that no policy ever enters, as one
program that comes through standard input. Into the policy's come the files that it made, and a program that
knows neither solution nor check (:data:`SETTLE`), which ends before the policy begins.

A task's id is its name and the number of its variant, ``text-join/3``. Variants differ in what is asked and
in every file; the splits share the kinds of tasks and no variant.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

from agentgym.environments.code import (
    terminal_archives,
    terminal_chore,
    terminal_database,
    terminal_files,
    terminal_git,
    terminal_live,
    terminal_processes,
    terminal_repository,
    terminal_sqlite,
    terminal_text,
)
from agentgym.environments.code.terminal_chore import Chore

MODULES: Mapping[str, ModuleType] = MappingProxyType(
    {
        "files": terminal_files,
        "text": terminal_text,
        "git": terminal_git,
        "archives": terminal_archives,
        "processes": terminal_processes,
        "sqlite": terminal_sqlite,
    }
)
"""Where the tasks of a category are, in the order of the task sets."""

BESIDE: Mapping[str, tuple[ModuleType, ...]] = MappingProxyType(
    {"git": (terminal_repository,), "sqlite": (terminal_database,)}
)
"""What a category's module imports beside :mod:`terminal_chore`."""

CATEGORIES = tuple(MODULES)

CHORES: Mapping[str, type[Chore]] = MappingProxyType(
    {chore.name: chore for module in MODULES.values() for chore in module.CHORES}
)
"""The kinds of tasks by name, in the order of the task sets."""

VARIANTS: Mapping[str, range] = MappingProxyType(
    {"train": range(16), "valid": range(16, 18), "test": range(18, 20)}
)
"""Numbers of the variants of each split."""

PROGRAM = r"""
import json, sys, types
sys.dont_write_bytecode = True
given = json.load(sys.stdin)
sys.stdin.close()
for name, source in given["sources"]:
    module = types.ModuleType(name)
    sys.modules[name] = module
    exec(compile(source, name, "exec"), module.__dict__)
chore = next(kind for kind in module.CHORES if kind.name == given["name"])(given["variant"])
from pathlib import Path
if given["do"] == "judge":
    why = sys.modules[given["sources"][0][0]].judged(chore, given["before"], given["after"], given["done"])
    print(json.dumps({"why": why}))
else:
    root = Path(given["root"])
    root.mkdir(parents=True, exist_ok=True)
    chore.lay(root)
    print(json.dumps({"laid": True}))
"""

COMMAND = ("python3", "-I", "-S", "-B", "-c", PROGRAM)
"""What a sandbox runs with :func:`lay` or :func:`judge` as its input."""


SETTLE = r"""
import json, os, subprocess, sys
given = json.load(sys.stdin)
sys.stdin.close()
for folder, folders, files in os.walk("."):
    if ".git" in folders:  # its index knows the times
        subprocess.run(["git", "update-index", "-q", "--refresh"], cwd=folder, stdout=subprocess.DEVNULL)
    if not given["git"]:
        for entry in folders + files:
            os.utime(os.path.join(folder, entry), (1.6e9, 1.6e9), follow_symlinks=False)
if given["starts"]:
    module = {"__name__": "live"}
    exec(compile(given["source"], "live", "exec"), module)
    module[given["starts"]](**given["given"])
"""
"""Makes copied files a task's folder: their times are no time of today, and what is to run beside runs."""

SETTLING = ("python3", "-I", "-S", "-B", "-c", SETTLE)
"""What the policy's sandbox runs in the folder, with :func:`settle` as its input, before the policy does."""


def category(name: str) -> str:
    """The category of a kind of task."""
    return name.partition("-")[0]


def chore(task_id: str) -> Chore:
    """The variant that an id names, which must be one of a task set."""
    name, _, variant = task_id.rpartition("/")
    return CHORES[name](int(variant))


def lay(task_id: str, root: str) -> bytes:
    """Input for making a task's folder ``root``, in a sandbox that no policy enters."""
    return _input(task_id, {"do": "lay", "root": root})


def settle(task_id: str) -> bytes:
    """Input for :data:`SETTLING`: what runs beside the policy, and nothing of the solution or the check."""
    made = chore(task_id)
    live = made.live()
    source = Path(str(terminal_live.__file__)).read_text("utf-8") if live else ""
    return json.dumps(
        {
            "git": "git" in made.needs,
            "source": source,
            "starts": live and live.starts,
            "given": live and live.given,
        }
    ).encode()


def judge(task_id: str, before: str, after: str, done: Sequence[Mapping[str, Any]]) -> bytes:
    """Input for judging what a policy left.

    Args:
        task_id: The task.
        before: The folder as it was made, once more.
        after: What the policy left.
        done: What the runs of its program came to: ``code``, ``stdout`` and ``files`` of each.
    """
    return _input(task_id, {"do": "judge", "before": before, "after": after, "done": list(done)})


def _input(task_id: str, request: Mapping[str, Any]) -> bytes:
    name, _, variant = task_id.rpartition("/")
    modules = (terminal_chore, *BESIDE.get(category(name), ()), MODULES[category(name)])
    sources = [(module.__name__, Path(str(module.__file__)).read_text("utf-8")) for module in modules]
    return json.dumps({"sources": sources, "name": name, "variant": int(variant), **request}).encode()
