"""Recipes: what instances of repository repair are made of, without a line of anybody else's code.

Invariant: a recipe names two successive releases of a package by the hashes of their archives, says which
tests tell them apart, and states in our words what goes wrong in the older one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from agentgym.errors import DataUnavailable

FILE = Path(__file__).with_name("repair_recipes.json")


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class File(_Part):
    """An archive of the package index."""

    version: str
    file: str
    """Its name."""
    sha256: str


class Library(File):
    """A wheel that tests need."""

    package: str
    licence: str


class Digest(_Part):
    """A list of tests that is too long to be written down; it is measured anew when an instance is built."""

    count: int
    sha256: str
    """Of the sorted names, a line each."""


class Recipe(_Part):
    """One instance."""

    id: str
    package: str
    old: File
    """The source archive of the release that is repaired."""
    new: File
    """That of the release after it."""
    licence: str
    """Of the package, as an SPDX expression."""
    python: str
    """The Python on which the tests were listed."""
    libraries: tuple[str, ...]
    """Names in :attr:`Recipes.libraries`, in the order in which modules are looked for."""
    modules: tuple[str, ...]
    """Folders to import from; ``.`` is the root."""
    sources: tuple[str, ...]
    """The package's own files and folders."""
    tests: tuple[str, ...]
    """Folders and files of its tests."""
    unstable: tuple[str, ...] = ()
    """Tests that did not end alike in three runs, or that ask for what no statement can tell."""
    fail_to_pass: tuple[str, ...]
    pass_to_pass: Digest
    statement: str
    """What goes wrong."""


class Recipes(_Part):
    """All of them."""

    libraries: dict[str, Library]
    recipes: tuple[Recipe, ...]


@lru_cache(maxsize=1)
def recipes() -> Recipes:
    """The recipes of this release.

    Raises:
        DataUnavailable: Their file is damaged.
    """
    try:
        return Recipes.model_validate_json(FILE.read_bytes())
    except (OSError, ValidationError) as error:
        raise DataUnavailable(f"{FILE} is damaged: {error}", hint="install AgentGym anew") from error


def digest(names: Sequence[str]) -> Digest:
    """The digest of a list of tests."""
    text = "\n".join(sorted(names)).encode("utf-8", "backslashreplace")
    return Digest(count=len(names), sha256=hashlib.sha256(text).hexdigest())
