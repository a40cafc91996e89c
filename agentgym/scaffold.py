"""A new environment package from a name: what ``agentgym new NAME`` writes.

Invariant: what is written installs, and its own test passes, before anybody has changed a line; nothing that
exists is overwritten.
"""

from __future__ import annotations

import keyword
import re
import sys
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from string import Template

from agentgym.errors import StorageFailed, UsageError

LAYOUT = {
    "pyproject.toml": "pyproject.toml.template",
    "README.md": "README.md.template",
    "src/{package}/__init__.py": "init.py.template",
    "src/{package}/environment.py": "environment.py.template",
    "tests/test_environment.py": "test_environment.py.template",
}
"""Files of the package, and the templates they come from."""


def create(name: str, folder: Path = Path()) -> list[Path]:
    """Write an installable environment package into ``folder / name``.

    Args:
        name: The distribution's name: letters, digits, ``-`` and ``_``, a letter first.
        folder: Where the package's own folder is made.

    Returns:
        The files written, ``pyproject.toml`` first.

    Raises:
        UsageError: The name cannot be a package's, or its folder exists.
        StorageFailed: The folder cannot be written.
    """
    package = _package(name)
    title = "".join(word[:1].upper() + word[1:] for word in package.split("_"))
    names = {"distribution": name, "package": package, "title": title, "id": f"{package}/{title}-v0"}
    root = folder / name
    if root.exists():
        raise UsageError(f"{root} exists already", hint="choose another name or folder")
    templates = files("agentgym") / "templates"
    written = []
    try:
        for target, template in LAYOUT.items():
            path = root / target.format(package=package)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(Template((templates / template).read_text("utf-8")).substitute(names), "utf-8")
            written.append(path)
    except OSError as error:
        raise StorageFailed(
            f"cannot write {error.filename}: {error.strerror}", hint="choose a folder that can be written"
        ) from error
    return written


def _package(name: str) -> str:
    """The import name of a distribution."""
    if not re.fullmatch(r"[A-Za-z](?:[A-Za-z0-9]|[-_](?=[A-Za-z0-9]))*", name) or len(name) > 60:
        raise UsageError(
            f"{name!r} cannot name a package",
            hint="use at most 60 letters, digits and single dashes or underscores, a letter first",
        )
    package = name.replace("-", "_").lower()
    if keyword.iskeyword(package) or package in sys.stdlib_module_names:
        raise UsageError(f"{name!r} is a name of Python's own", hint=f"call it {name}-env, for example")
    if find_spec(package) is not None:
        raise UsageError(
            f"a package {package!r} is installed already", hint=f"call it {name}-env, for example"
        )
    return package
