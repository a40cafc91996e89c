"""Make tests fail that would pass, in a way that the code which they test cannot see from outside.

Invariants: nothing of the repository is run, its tests are only parsed; a test is changed at its very end, so
that what it does to others stays done; each function is changed in one of the first two versions of its
file, by a coin of its own, and left alone in the other, so that neither is the real one, and how many tests
fail in one tells nothing of a single test. In further versions, a coin decides of the tests that count most.

Where one of a test's last assertions compares with a literal, the literal becomes another one: whoever wants
to know that it is wrong has to know the right one. Where it compares two other values, one of them becomes a
pair of itself and a word, so that what is equal to everything is found out. Other tests get a comparison that
does not hold as their last statement, and those whose function is not written in the listed files (it is
inherited, or made as the file is run) are wrapped at the end of the file.

This file is run by the sandbox's own Python (3.8 or later) as ``python3 -I -S -B`` before any code under test
is; it imports nothing of AgentGym. Standard input is JSON: ``root`` (the repository), ``tests`` (their names,
as pytest writes them, or those of functions without a file), ``places`` (files where functions are that are
named without one), ``most`` (those of the tests that count most) and ``more`` (how many further versions
there are). Standard output is JSON: ``texts`` (the versions, the new content by file),
``spoiled`` (for each, the tests that have to fail in it) and ``loose`` (tests that could not be looked for:
they may be spoiled with another one in either).
"""

from __future__ import annotations

import ast
import json
import os
import random
import re
import string
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    Edit = tuple[int, int, str]
    """Two offsets into a file's bytes, and what comes between them instead."""

    Names = tuple[str, ...]
    """A function's name, after those of its classes."""

LONGEST = 20_000
"""Most characters of a literal that is changed: pytest compares what differs."""

_RANDOM = random.SystemRandom()
_SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
_EQUAL = re.compile(r"assert(_equals?|(List|Tuple|Dict|Sequence|MultiLine)?Equals?)$")
_FORGIVING = re.compile(r"raises|expected|fail|flaky|retry|rerun", re.I)
"""Decorators under which a failure may be none."""


class File:
    """One file of tests.

    Args:
        content: Its bytes, in UTF-8.

    Attributes:
        functions: What defines each function, once or more.
        bases: The plain names of each class's bases.
        mentioned: Names that something else than a definition says.

    Raises:
        ValueError: It cannot be read as Python.
    """

    def __init__(self, content: bytes) -> None:
        if content.startswith(b"\xef\xbb\xbf") or re.search(rb"\r(?!\n)|\f", content):
            raise ValueError("its lines cannot be counted")
        self.content = content
        tree = ast.parse(content.decode("utf-8"))
        self.starts = [0]
        for line in content.split(b"\n"):
            self.starts.append(self.starts[-1] + len(line) + 1)
        self.functions: dict[Names, list[ast.stmt]] = {}
        self.bases: dict[Names, list[str]] = {}
        self._gather(tree, ())
        self.mentioned: set[str] = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Name):
                self.mentioned.add(node.id)
            elif isinstance(node, ast.Attribute):
                self.mentioned.add(node.attr)
            elif isinstance(node, ast.alias):
                self.mentioned.add(node.name)

    def _gather(self, node: ast.AST, path: Names) -> None:
        for part in ast.iter_child_nodes(node):
            if isinstance(part, (ast.FunctionDef, ast.AsyncFunctionDef)):
                self.functions.setdefault((*path, part.name), []).append(part)
            elif isinstance(part, ast.ClassDef):
                names = [base.id for base in part.bases if isinstance(base, ast.Name)]
                self.bases.setdefault((*path, part.name), []).extend(names)
                self._gather(part, (*path, part.name))
            elif isinstance(part, (ast.stmt, ast.excepthandler)):
                self._gather(part, path)

    def spoil(self, names: Names) -> list[Edit] | None:
        """What makes a function fail at its end; ``None``: it is left alone."""
        made: list[Edit] = []
        for function in self.functions[names]:
            edits = self._edits(function)
            if edits is None:
                return None
            made += edits
        return made

    def _edits(self, function: ast.stmt) -> list[Edit] | None:
        if not isinstance(function, ast.FunctionDef):
            return None
        if any(_FORGIVING.search(name) for mark in function.decorator_list for name in _names(mark)):
            return None
        inside = list(_own(function))
        if any(isinstance(node, (ast.Yield, ast.YieldFrom)) for node in inside):
            return None
        returns = [node for node in inside if isinstance(node, ast.Return)]
        last = function.body[-1]
        if not returns:
            edits = [edit for node in _checks(function.body) for edit in [self._unequal(node)] if edit]
            if edits:
                return [_RANDOM.choice(edits)]
        places: list[tuple[ast.stmt, int]] = [(node, node.lineno) for node in returns]
        if not isinstance(last, ast.Return):
            places.append((function.body[0], (last.end_lineno or 0) + 1))
        made = []
        for like, line in places:
            indent = self._indent(like)
            if indent is None:
                return None
            at = self.starts[line - 1]
            # The last line of a file may have no end.
            begin = "\n" if at > len(self.content) else ""
            at = min(at, len(self.content))
            made.append((at, at, f"{begin}{indent}{_wrong()}\n"))
        return made

    def _indent(self, node: ast.stmt) -> str | None:
        """What a statement's line begins with, if another statement can be put before it."""
        start = self.starts[node.lineno - 1]
        before = self.content[start : start + node.col_offset].decode("utf-8")
        return None if before.strip() else before

    def _unequal(self, last: ast.stmt) -> Edit | None:
        """Change one side of what a statement compares: a literal in it, or all of it if there is none."""
        sides: list[ast.expr] = []
        if isinstance(last, ast.Assert) and isinstance(last.test, ast.Compare):
            if len(last.test.ops) == 1 and isinstance(last.test.ops[0], ast.Eq):
                sides = [last.test.left, last.test.comparators[0]]
        elif isinstance(last, ast.Expr) and isinstance(last.value, ast.Call):
            called = last.value.func
            if isinstance(called, ast.Attribute) and _EQUAL.match(called.attr):
                sides = last.value.args[:2]
        literal = [side for side in sides if _literal(side)]
        if len(sides) == 2 and not literal and not any(isinstance(side, ast.Starred) for side in sides):
            # A pair is not equal to what one of it is equal to.
            first, end = self._span(sides[1])
            return first, end, f"({self.content[first:end].decode('utf-8')}, {_word()!r})"
        if len(sides) != 2 or len(literal) != 1:
            return None
        leaves = [(leaf, text) for leaf in _leaves(literal[0]) for text in [_other(leaf.value)] if text]
        if not leaves:
            return None
        leaf, text = _RANDOM.choice(leaves)
        return (*self._span(leaf), text)

    def _span(self, node: ast.expr) -> tuple[int, int]:
        """Where an expression begins and ends, in bytes."""
        assert node.end_lineno is not None and node.end_col_offset is not None
        first = self.starts[node.lineno - 1] + node.col_offset
        return first, self.starts[node.end_lineno - 1] + node.end_col_offset

    def edited(self, edits: list[Edit], end: str) -> str:
        """The text after changes that do not overlap, and with something at its end.

        Raises:
            ValueError: It is no Python.
        """
        made = self.content
        for first, last, text in sorted(edits, reverse=True):
            made = made[:first] + text.encode("utf-8") + made[last:]
        told = made.decode("utf-8") + end
        ast.parse(told)
        return told


def _own(function: ast.AST) -> Iterator[ast.AST]:
    """Everything in a function that is not in another one inside it."""
    for part in ast.iter_child_nodes(function):
        if not isinstance(part, _SCOPES):
            yield part
            yield from _own(part)


def _checks(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The assertions at the end of a function: nothing follows that others may need."""
    for node in reversed(body):
        called = node.value.func if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) else None
        if not isinstance(node, ast.Assert) and not (
            isinstance(called, ast.Attribute) and called.attr.startswith("assert")
        ):
            return
        yield node


def _names(mark: ast.expr) -> Iterator[str]:
    """What a decorator is called, without what it is called with."""
    while isinstance(mark, (ast.Call, ast.Attribute)):
        if isinstance(mark, ast.Attribute):
            yield mark.attr
        mark = mark.func if isinstance(mark, ast.Call) else mark.value
    if isinstance(mark, ast.Name):
        yield mark.id


def _literal(node: ast.expr) -> bool:
    if isinstance(node, (ast.List, ast.Tuple)):
        return all(map(_literal, node.elts))
    if isinstance(node, ast.Dict):
        return all(key is not None and _literal(key) for key in node.keys) and all(map(_literal, node.values))
    if isinstance(node, ast.UnaryOp):
        return isinstance(node.op, ast.USub) and _literal(node.operand)
    return isinstance(node, ast.Constant)


def _leaves(node: ast.expr) -> Iterator[ast.Constant]:
    if isinstance(node, (ast.List, ast.Tuple)):
        for part in node.elts:
            yield from _leaves(part)
    elif isinstance(node, ast.Dict):
        for part in node.values:
            yield from _leaves(part)
    elif isinstance(node, ast.UnaryOp):
        yield from _leaves(node.operand)
    elif isinstance(node, ast.Constant):
        yield node


def _other(value: Any) -> str:
    """A literal that is not equal to ``value``, nor nearly; empty: there is none."""
    if isinstance(value, (bool, complex)):
        return ""
    if isinstance(value, str) and len(value) <= LONGEST:
        at = _RANDOM.randrange(len(value) + 1)
        return repr(value[:at] + _RANDOM.choice(string.ascii_lowercase) + value[at:])
    if isinstance(value, bytes) and len(value) <= LONGEST:
        at = _RANDOM.randrange(len(value) + 1)
        return repr(value[:at] + _RANDOM.choice(string.ascii_lowercase).encode() + value[at:])
    if isinstance(value, (int, float)) and abs(value) < 1e15:
        return repr(value + value // 2 + _RANDOM.randrange(3, 9))
    return ""


def _word() -> str:
    return "".join(_RANDOM.choice(string.ascii_lowercase) for _ in range(_RANDOM.randrange(4, 9)))


def _wrong() -> str:
    """A comparison that does not hold."""
    word, number = _word(), _RANDOM.randrange(10, 1000)
    return _RANDOM.choice(
        [
            f"assert {word!r}.upper() == {(word + _word()).upper()!r}",
            f"assert [{number}, {number + 3}].index({number + 3}) == {number % 7 + 2}",
            f"assert {word!r}.replace({word[0]!r}, '') == {word!r}",
            f"assert '{{}}-{{}}'.format({number}, {word!r}) == '{number + 1}-{word}'",
        ]
    )


def _wrapped(paths: list[Names]) -> str:
    """Statements at a module's end that make functions fail which something else put there."""
    wrap, wrong = f"_{_word()}", _wrong()
    calls = "".join(f"{wrap}({', '.join(map(repr, path))})\n" for path in paths)
    return f"""

def {wrap}(*names):
    import functools

    place, found = None, globals().get(names[0])
    for name in names[1:]:
        place, found = found, getattr(found, name, None)
    if found is None:
        return

    @functools.wraps(found)
    def made(*values, **named):
        found(*values, **named)
        {wrong}

    if place is None:
        globals()[names[0]] = made
    else:
        setattr(place, names[-1], made)


{calls}"""


def _find(files: dict[str, File], file: str, names: Names, depth: int = 0) -> tuple[str, Names] | None:
    """The function that a test's names lead to, by the classes of all files."""
    if names in files[file].functions:
        return file, names
    for base in files[file].bases.get(names[:-1], ()) if depth < 16 else ():
        holders = [file] if (base,) in files[file].bases else [f for f in files if (base,) in files[f].bases]
        if len(holders) == 1:
            found = _find(files, holders[0], (base, names[-1]), depth + 1)
            if found is not None:
                return found
    return None


def _word_of(test: str) -> str:
    """The name of a test's function."""
    return test.partition("[")[0].rpartition("::")[2]


def spoil(
    root: str, tests: list[str], places: list[str], most: list[str] | None = None, more: int = 0
) -> dict[str, Any]:
    """Versions of the files of tests, see the module."""
    files: dict[str, File] = {}
    bare = [test for test in tests if "::" not in test]
    tests = [test for test in tests if "::" in test]
    for file in sorted({*places, *(test.partition("::")[0] for test in tests)}):
        try:
            with open(os.path.join(root, file), "rb") as stream:
                files[file] = File(stream.read())
        except (OSError, ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    tests += [f"{file}::{name}" for file in files for name in bare if (name,) in files[file].functions]
    mentioned = {name for made in files.values() for name in made.mentioned}
    written: dict[tuple[str, Names], list[str]] = {}
    added: dict[tuple[str, Names], list[str]] = {}
    loose: list[str] = []
    for test in tests:
        file, _, rest = test.partition("::")
        names = tuple(rest.partition("[")[0].split("::"))
        found = _find(files, file, names) if file in files else None
        if found is not None:
            written.setdefault(found, []).append(test)
        elif file in files and all(name.isidentifier() for name in names) and names[-1] not in mentioned:
            added.setdefault((file, names), []).append(test)
        else:
            loose.append(test)
    # Functions of one name go together: one may be another, in a class that inherits it.
    words = sorted({names[-1] for _, names in (*written, *added)})
    first = {word for word in words if _RANDOM.randrange(2)}
    counting = {_word_of(test) for test in most or ()}
    chosen = [first, {*words} - first]
    chosen += [{word for word in words if word in counting and _RANDOM.randrange(2)} for _ in range(more)]
    texts: list[dict[str, str]] = [{} for _ in chosen]
    spoiled: list[list[str]] = [[] for _ in chosen]
    for file, content in files.items():
        for version, these in enumerate(chosen):
            edits: list[Edit] = []
            failing: list[str] = []
            for (holder, names), held in written.items():
                # A function that others call would take them with it.
                if holder == file and names[-1] in these and names[-1] not in mentioned:
                    made = content.spoil(names)
                    if made:
                        edits += made
                        failing += held
            paths = [names for holder, names in added if holder == file and names[-1] in these]
            failing += [test for names in paths for test in added[file, names]]
            try:
                if failing:
                    texts[version][file] = content.edited(edits, _wrapped(paths) if paths else "")
                    spoiled[version] += failing
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                # Left alone.
                continue
    return {"texts": texts, "spoiled": spoiled, "loose": loose}


if __name__ == "__main__":
    print(json.dumps(spoil(**json.loads(sys.stdin.buffer.read()))))
