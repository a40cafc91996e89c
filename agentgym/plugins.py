"""Third-party parts, found by entry points or named by import path.

Invariant: nothing is imported until it is asked for by name, and a broken plug-in never hides the others.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal

from agentgym.errors import UnknownName, UsageError

Group = Literal["environments", "policies", "tools", "sandboxes", "algorithms", "commands"]


@cache
def declared(group: Group) -> dict[str, EntryPoint]:
    """The entry points of ``agentgym.<group>`` in installed packages, by name."""
    return {point.name: point for point in entry_points(group=f"agentgym.{group}")}


def import_path(path: str) -> Any:
    """The object at ``package.module:name``.

    Raises:
        UsageError: Nothing can be imported there.
    """
    module, _, name = path.partition(":")
    try:
        target = importlib.import_module(module)
        for part in name.split("."):
            target = getattr(target, part)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise UsageError(
            f"cannot import {path!r}: {error}", hint="write package.module:name, and install the package"
        ) from error
    return target


def find(group: Group, name: str, builtin: dict[str, str], kind: str) -> Any:
    """The part called ``name``: built in, declared by a plug-in, or an import path.

    Args:
        group: The entry-point group.
        name: A short name, or ``package.module:name``.
        builtin: Import paths of the built-in parts by name.
        kind: What to call it in an error.

    Raises:
        UnknownName: No such name; the near ones are listed.
        UsageError: What the name stands for cannot be imported.
    """
    if name in builtin:
        return import_path(builtin[name])
    if name in declared(group):
        return _load(declared(group)[name], kind)
    if ":" in name:
        return import_path(name)
    raise UnknownName(kind, name, [*builtin, *declared(group)], hint="or give package.module:name")


def _load(point: EntryPoint, kind: str) -> Any:
    try:
        return point.load()
    except (ImportError, AttributeError) as error:
        source = f"the package {point.dist.name!r}" if point.dist else "an installed package"
        raise UsageError(
            f"the {kind} {point.name!r} of {source} cannot be loaded from {point.value}: {error}",
            hint="reinstall or remove that package",
        ) from error


@cache
def load_environments() -> None:
    """Run every ``agentgym.environments`` entry point once; each registers its ids.

    An entry point is a callable without arguments, or a module whose import registers. One that fails is
    reported by a warning after all have run.
    """
    failures = []
    for name, point in declared("environments").items():
        try:
            loaded: Callable[[], None] | Any = point.load()
            if callable(loaded):
                loaded()
        except Exception as error:
            failures.append(f"environment plug-in {name!r} ({point.value}) failed: {error}")
    for failure in failures:
        warnings.warn(failure, stacklevel=2)
