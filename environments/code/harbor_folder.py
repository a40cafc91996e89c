"""Task folders in the forms of Harbor and of Terminal-Bench 1, read.

Invariants: nothing of a folder is executed by reading it, and no variable of this machine's environment gets
into a task; what a folder asks for and cannot have here is told by :attr:`TaskFolder.lacks`, never ignored.

The forms, from their own documentation: Harbor has ``task.toml``, ``instruction.md``, ``environment/``,
``tests/test.sh`` (which writes ``/logs/verifier/reward.txt`` or ``reward.json``) and ``solution/solve.sh``.
Terminal-Bench 1 has ``task.yaml``, a ``Dockerfile`` (and ``docker-compose.yaml``), ``run-tests.sh``,
``tests/`` and ``solution.sh``; there the summary that pytest prints decides.
"""

from __future__ import annotations

import hashlib
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from agentgym.errors import DataUnavailable, MissingDependency, UsageError

Form = Literal["harbor", "terminal-bench"]

MOST = 1 << 20
"""Largest file of a folder that is read here, in bytes."""

DEPTH = 2
"""How deep below the given folder tasks are looked for."""

WORKDIR = "/app"
"""The working directory where neither the task nor its Dockerfile names one."""

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMG])B?", re.IGNORECASE)
_UNITS = {"K": 1 / 1024, "M": 1.0, "G": 1024.0}


@dataclass(frozen=True)
class TaskFolder:
    """One task.

    Attributes:
        id: The folder's path below the given one, or its name.
        form: Whose form it has.
        path: The folder.
        instruction: What the policy is asked to do.
        image: Image that it names itself.
        context: Folder with the Dockerfile of its image.
        workdir: Where the policy works.
        artifacts: Paths that are judged, absolute; none: the working directory.
        tests: Folder that is seen as ``/tests`` when it is judged.
        script: What judges, below ``/tests``.
        solution: Its solution, a script or a folder with ``solve.sh``.
        seconds: Deadline of judging.
        cpus: Processors.
        memory: Megabytes of memory.
        storage: Megabytes of files.
        env: Variables of the policy's commands.
        judging_env: Variables of the script that judges.
        metadata: What else it says of itself.
        lacks: What it needs and cannot have here; empty where it can be used.
    """

    id: str
    form: Form
    path: Path
    instruction: str
    image: str | None
    context: Path | None
    workdir: str
    artifacts: tuple[str, ...]
    tests: Path
    script: str
    solution: Path | None
    seconds: float
    cpus: float
    memory: int
    storage: int
    env: Mapping[str, str]
    judging_env: Mapping[str, str]
    metadata: Mapping[str, Any]
    lacks: str = ""

    @property
    def needs_image(self) -> bool:
        """Whether it works in an image of its own."""
        return self.image is not None or self.context is not None

    @property
    def digest(self) -> str:
        """A hash of what it says and of what judges it."""
        made = hashlib.sha256(repr((self.id, self.form, self.instruction, self.image, self.workdir)).encode())
        files = [self.tests] if self.tests.is_file() else sorted(self.tests.rglob("*"))
        for place in files:
            if place.is_file() and not place.is_symlink():
                made.update(str(place.relative_to(self.path)).encode() + b"\0" + place.read_bytes() + b"\0")
        return made.hexdigest()


def read_folder(folder: Path) -> list[TaskFolder]:
    """Every task in a folder, ordered by id.

    Args:
        folder: One task, or a folder of tasks, down to :data:`DEPTH` levels. Hidden folders and links are
            passed over.

    Raises:
        UsageError: There is no task in it.
        DataUnavailable: A task's files cannot be read as they should be.
        MissingDependency: A task is in YAML, and pyyaml is not installed.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder} is no folder", hint="give a task's folder, or a folder of tasks")
    found: list[TaskFolder] = []
    waiting = [(folder, 0)]
    while waiting:
        place, depth = waiting.pop()
        id = str(place.relative_to(folder)) if depth else place.resolve().name
        if (place / "task.toml").is_file():
            found.append(_harbor(place, id))
        elif (place / "task.yaml").is_file():
            found.append(_terminal_bench(place, id))
        elif depth < DEPTH:
            inner = (p for p in place.iterdir() if p.is_dir() and not p.is_symlink())
            waiting += [(p, depth + 1) for p in inner if not p.name.startswith(".")]
    if not found:
        raise UsageError(
            f"there is no task in {folder}", hint="a task's folder has a task.toml (Harbor) or a task.yaml"
        )
    return sorted(found, key=lambda task: task.id)


def _harbor(path: Path, id: str) -> TaskFolder:
    place = path / "task.toml"
    try:
        given = tomllib.loads(_text(place))
    except tomllib.TOMLDecodeError as error:
        raise DataUnavailable(f"{place} is no TOML: {error}") from error
    environment, verifier = _table(given, "environment", place), _table(given, "verifier", place)
    inside = path / "environment"
    dockerfile = inside / "Dockerfile"
    artifacts = [_source(entry, place) for entry in _list(given, "artifacts", place)]
    env, judging_env = _env(environment, place), _env(verifier, place)
    image = environment.get("docker_image")
    lacks = [
        (given.get("steps") is not None or (path / "steps").is_dir(), "it has several steps"),
        ((inside / "docker-compose.yaml").is_file(), "it needs several containers (docker-compose.yaml)"),
        (not (path / "instruction.md").is_file(), "it has no instruction.md"),
        (not (path / "tests" / "test.sh").is_file(), "it has no tests/test.sh"),
        (bool(verifier.get("environment")), "it is judged in an image of its own"),
        (str(environment.get("os", "linux")) != "linux", "it is no task for Linux"),
        (bool(environment.get("gpus")), "it needs a GPU"),
        (bool(environment.get("mcp_servers")), "it needs MCP servers"),
        (
            any("${" in value for value in (*env.values(), *judging_env.values())),
            "it asks for variables of this machine",
        ),
    ]
    solution = path / "solution"
    return TaskFolder(
        id,
        "harbor",
        path,
        _text(path / "instruction.md").strip() if (path / "instruction.md").is_file() else "",
        str(image) if image else None,
        inside if dockerfile.is_file() and not image else None,
        str(environment.get("workdir") or _workdir(dockerfile)),
        tuple(artifacts),
        path / "tests",
        "test.sh",
        solution if (solution / "solve.sh").is_file() else None,
        _number(verifier, "timeout_sec", 600.0, place),
        _number(environment, "cpus", 1.0, place),
        _megabytes(environment, "memory", 2048, place),
        _megabytes(environment, "storage", 10240, place),
        env,
        judging_env,
        _table(given, "metadata", place),
        "; ".join(why for true, why in lacks if true),
    )


def _terminal_bench(path: Path, id: str) -> TaskFolder:
    place = path / "task.yaml"
    given = _yaml(place)
    if not isinstance(given.get("instruction"), str):
        raise DataUnavailable(f"{place} has no instruction", hint="the task is not whole")
    services: Mapping[str, Any] = {}
    compose = path / "docker-compose.yaml"
    if compose.is_file():
        services = _table(_yaml(compose), "services", compose)
    dockerfile = path / "Dockerfile"
    parser = str(given.get("parser_name", "pytest"))
    lacks = [
        (len(services) > 1, "it needs several containers (docker-compose.yaml)"),
        (not dockerfile.is_file(), "it has no Dockerfile"),
        (not (path / "run-tests.sh").is_file(), "it has no run-tests.sh"),
        (parser != "pytest", f"its results are not those of pytest ({parser})"),
        (bool(given.get("run_tests_in_same_shell")), "it is judged in the policy's own shell"),
    ]
    known = ("difficulty", "category", "tags")
    return TaskFolder(
        id,
        "terminal-bench",
        path,
        given["instruction"].strip(),
        None,
        path,
        _workdir(dockerfile),
        (),
        path / "tests" if (path / "tests").is_dir() else path / "run-tests.sh",
        "run-tests.sh",
        path / "solution.sh" if (path / "solution.sh").is_file() else None,
        _number(given, "max_test_timeout_sec", 60.0, place),
        1.0,
        2048,
        10240,
        {},
        {"TEST_DIR": "/tests"},
        {name: given[name] for name in known if name in given},
        "; ".join(why for true, why in lacks if true),
    )


def _text(place: Path) -> str:
    try:
        if place.stat().st_size > MOST:
            raise DataUnavailable(f"{place} has more than {MOST} bytes")
        return place.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataUnavailable(f"{place} cannot be read: {error}", hint="the task is not whole") from error


def _yaml(place: Path) -> Mapping[str, Any]:
    try:
        import yaml  # type: ignore[import-untyped]
    except ImportError as error:
        raise MissingDependency("pyyaml", "code") from error
    try:
        given = yaml.safe_load(_text(place))
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise DataUnavailable(f"{place} is no YAML: {str(error)[:300]}") from error
    if not isinstance(given, dict):
        raise DataUnavailable(f"{place} is no mapping", hint="the task is not whole")
    return given


def _table(given: Mapping[str, Any], key: str, place: Path) -> Mapping[str, Any]:
    value = given.get(key) or {}
    if not isinstance(value, dict):
        raise DataUnavailable(f"{key} in {place} is no table")
    return value


def _list(given: Mapping[str, Any], key: str, place: Path) -> Sequence[Any]:
    value = given.get(key) or []
    if not isinstance(value, list):
        raise DataUnavailable(f"{key} in {place} is no list")
    return value


def _source(entry: Any, place: Path) -> str:
    path = entry.get("source") if isinstance(entry, dict) else entry
    if (
        not isinstance(path, str)
        or not path.startswith("/")
        or ".." in path.split("/")
        or path.strip("/") == ""
    ):
        raise DataUnavailable(f"an artifact of {place} is no absolute path: {entry!r}"[:300])
    return path.rstrip("/")


def _env(given: Mapping[str, Any], place: Path) -> dict[str, str]:
    return {str(name): str(value) for name, value in _table(given, "env", place).items()}


def _number(given: Mapping[str, Any], key: str, default: float, place: Path) -> float:
    value = given.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e6:
        raise DataUnavailable(f"{key} in {place} is {value!r}; a number above 0 is expected")
    return float(value)


def _megabytes(given: Mapping[str, Any], key: str, default: int, place: Path) -> int:
    if (text := given.get(key)) is not None:
        read = _SIZE.fullmatch(str(text).strip())
        if read is None:
            raise DataUnavailable(f"{key} in {place} is {text!r}; such as 2G is expected")
        return max(1, int(float(read[1]) * _UNITS[read[2].upper()]))
    return int(_number(given, f"{key}_mb", default, place))


def _workdir(dockerfile: Path) -> str:
    """The last ``WORKDIR`` of a Dockerfile that is a plain absolute path."""
    found = WORKDIR
    if dockerfile.is_file():
        for line in _text(dockerfile).splitlines():
            words = line.split()
            if len(words) == 2 and words[0].upper() == "WORKDIR" and re.fullmatch(r"(/[\w.-]+)+/?", words[1]):
                found = words[1].rstrip("/")
    return found
