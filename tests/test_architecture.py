"""The house plan, held: which room may import which, and what an import may cost."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAPPED = ("environments", "sandboxes", "tools", "trainers")
ROOMS = ("agentgym", *MAPPED)

# What a room may import beside itself. `core` is agentgym/ without its cli/, the composition root.
ALLOWED = {
    "core": set(),
    "sandboxes": {"core"},
    "tools": {"core", "sandboxes"},
    "environments": {"core", "sandboxes", "tools"},
    "trainers": {"core", "tools"},
    "cli": {"core", "sandboxes", "tools", "environments", "trainers"},
}
HEAVY = (
    "torch",
    "transformers",
    "vllm",
    "playwright",
    "docker",
    "ray",
    "textworld",
    "peft",
    "pyarrow",
    "rich",
)
NOT_NAMES = {"utils", "util", "helper", "helpers", "manager", "managers", "misc", "common"}


def modules() -> list[Path]:
    return sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))


def room_of(name: str) -> str:
    """The room of a dotted module name inside the agentgym namespace."""
    parts = name.split(".")
    if len(parts) > 1 and parts[1] in (*MAPPED, "cli"):
        return parts[1]
    return "core"


def dotted(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[0] != "agentgym":
        parts.insert(0, "agentgym")
    if parts[-1] == "__init__":
        parts.pop()
    return ".".join(parts)


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Every module that ``path`` imports, lazily or not, with its line."""
    package = dotted(path) if path.name == "__init__.py" else dotted(path).rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join(
                    [*package.split(".")[: len(package.split(".")) - node.level + 1], base]
                ).strip(".")
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = ast.unparse(node.func)
            if called in ("importlib.import_module", "import_module", "__import__"):
                yield node.lineno, str(node.args[0].value)


def test_imports_go_one_way() -> None:
    wrong = []
    for path in modules():
        room = room_of(dotted(path))
        for line, name in imports(path):
            top = name.split(".")[0]
            if top in MAPPED:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name} by its bare name")
            elif top == "agentgym" and room_of(name) not in ALLOWED[room] | {room}:
                wrong.append(f"{path.relative_to(ROOT)}:{line} ({room}) imports {name}")
    assert not wrong, "\n".join(wrong)


def test_importing_agentgym_stays_light() -> None:
    code = "import agentgym, sys; print('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = done.stdout.split()
    assert "agentgym.registry" in loaded
    heavy = [m for m in loaded if m.split(".")[0] in HEAVY]
    rooms = [m for m in loaded if m.startswith("agentgym.") and room_of(m) != "core"]
    assert not heavy and not rooms


def test_every_import_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    asked = [*project["dependencies"], *(requirement for extra in extras for requirement in extra)]
    declared = {re.split(r"[^\w.-]", requirement)[0].lower().replace("-", "_") for requirement in asked}
    trackers = {"wandb", "mlflow"}  # adapters to what a user has
    brought = {"fast_downward"}  # by alfworld: GPL, and never a dependency that we name ourselves
    called_otherwise = {"yaml"} if "pyyaml" in declared else set()
    ours = {*sys.stdlib_module_names, "agentgym", *declared, *called_otherwise, *trackers, *brought}
    missing = {
        (str(p.relative_to(ROOT)), n) for p in modules() for _, n in imports(p) if n.split(".")[0] not in ours
    }
    assert not missing


@pytest.mark.parametrize("room", MAPPED)
def test_a_mapped_folder_refuses_its_bare_name(room: str) -> None:
    done = subprocess.run([sys.executable, "-c", f"import {room}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"import agentgym.{room}, not {room}" in done.stderr


def test_a_module_has_one_idea() -> None:
    long = {str(p.relative_to(ROOT)): n for p in modules() if (n := len(p.read_text().splitlines())) > 600}
    assert not long
    assert not [p for p in modules() if p.stem in NOT_NAMES]


def test_every_module_states_its_idea() -> None:
    for path in modules():
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree), f"{path.relative_to(ROOT)} has no docstring"


def test_nothing_is_left_for_later_and_no_machine_is_named() -> None:
    wrong = re.compile(r"\b(TODO|FIXME|XXX)\b|NotImplementedError|(?<![\w.])/(work|home|root)/\w")
    found = [
        f"{path.relative_to(ROOT)}:{number} {line.strip()}"
        for path in modules()
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if wrong.search(line)
    ]
    assert not found, "\n".join(found)
