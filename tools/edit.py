"""The tool ``edit``: look at, make and change text files in a sandbox.

Invariant: a file keeps what an edit does not name: its other lines to the byte, its kind of line ends, a
missing line end at its end, and its mode. Nothing is guessed: text that stands in several places is replaced
in none.
"""

from __future__ import annotations

import posixpath
from typing import Annotated, Literal, NamedTuple

from pydantic import Field

from agentgym.sandboxes.base import MIB, Sandbox
from agentgym.tools.base import Tool, ToolError, tool
from agentgym.tools.sandboxed import told

SECONDS = 30.0
LINE = 2_000
"""Longest line shown, in characters."""
ENTRIES = 500
"""Most entries of a folder shown."""
AROUND = 4
"""Lines shown before and after a change."""
PLACES = 10
"""Most places told of a text that stands in several."""

# What a path is: `f MODE SIZE`, `d` and the entries of two levels, or `?`; NUL between items.
_LOOK = """
import os, stat, sys
path, most = os.fsencode(sys.argv[1]), int(sys.argv[2])
found = os.stat(path)
if stat.S_ISREG(found.st_mode):
    out = [b"f", b"%o" % (found.st_mode & 0o7777), b"%d" % found.st_size]
elif stat.S_ISDIR(found.st_mode):
    out = [b"d"]
    def walk(folder, before, deeper):
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            if len(out) > most + 1:
                return
            inside = entry.is_dir(follow_symlinks=False)
            out.append(before + entry.name + (b"/" if inside else b""))
            if inside and deeper and not entry.name.startswith(b"."):
                try:
                    walk(entry.path, before + entry.name + b"/", False)
                except OSError:
                    pass
    walk(path, b"", True)
else:
    out = [b"?"]
sys.stdout.buffer.write(b"\\0".join(out))
"""

Command = Literal["view", "create", "replace", "insert"]


def edit_tool(
    sandbox: Sandbox, *, limit: int = 16_000, max_bytes: int = MIB, description: str | None = None
) -> Tool:
    """``edit(command, path, …)``: one tool with the commands view, create, replace and insert.

    Args:
        sandbox: Where the files are.
        limit: Characters of a file shown at once.
        max_bytes: Largest file that is shown or changed.
        description: What to tell the policy, in place of the default.
    """
    editor = _Editor(sandbox, limit, max_bytes)
    words = description or (
        "Look at and change text files. view: a file's lines with their numbers (start and end choose some), "
        "or what is in a folder. create: write a whole file (text), in place of what was there. replace: put "
        "new in place of old, which must stand in the file exactly once, white space included. insert: put "
        "text after the line of that number (0: at the top)."
    )

    async def edit(
        command: Annotated[Command, Field(description="What to do.")],
        path: Annotated[str, Field(description="The file or folder.")],
        text: Annotated[str | None, Field(description="For create and insert.")] = None,
        old: Annotated[str | None, Field(description="For replace: what stands there.")] = None,
        new: Annotated[str | None, Field(description="For replace: what shall stand there.")] = None,
        line: Annotated[int | None, Field(description="For insert: after which line.")] = None,
        start: Annotated[int | None, Field(description="For view: the first line.")] = None,
        end: Annotated[int | None, Field(description="For view: the last line.")] = None,
    ) -> str:
        if not path.strip() or "\0" in path:
            raise ToolError("the path is empty, or none")
        with told():
            if command == "view":
                return await editor.view(path, start, end)
            if command == "create":
                return await editor.create(path, _needed(command, "text", text))
            if command == "replace":
                return await editor.replace(path, _needed(command, "old", old), _needed(command, "new", new))
            if line is None:
                raise ToolError("insert needs line: the number of the line after which the text comes")
            return await editor.insert(path, line, _needed(command, "text", text))

    return tool(name="edit", description=words)(edit)


class Text(NamedTuple):
    """The text of a file, with line feeds as line ends.

    Attributes:
        text: It.
        crlf: Whether all its line ends are carriage return and line feed.
        mode: The file's mode.
    """

    text: str
    crlf: bool = False
    mode: int = 0o644

    @property
    def lines(self) -> list[str]:
        """Its lines, without their ends."""
        lines = self.text.split("\n")
        return lines if lines[-1] else lines[:-1]

    @property
    def data(self) -> bytes:
        """It as it lies in a file."""
        return (self.text.replace("\n", "\r\n") if self.crlf else self.text).encode()

    def put(self, text: str) -> str:
        """What is written into it, with its line ends."""
        return text.replace("\r\n", "\n") if self.crlf else text


def read_text(data: bytes, mode: int = 0o644) -> Text | None:
    """The text of a file; ``None`` where it is none."""
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return None
    if "\0" in text:
        return None
    crlf = "\n" in text and text.count("\n") == text.count("\r\n")
    return Text(text.replace("\r\n", "\n") if crlf else text, crlf, mode)


def places(text: str, old: str) -> list[int]:
    """Where ``old`` stands in ``text``, overlaps included."""
    found, at = [], text.find(old)
    while at >= 0:
        found.append(at)
        at = text.find(old, at + 1)
    return found


def inserted(text: str, line: int, new: str) -> str:
    """``text`` with ``new`` as lines of its own after its line ``line``; its last line ends as it did."""
    lines = text.split("\n")
    lines[line:line] = new.removesuffix("\n").split("\n")
    return "\n".join(lines)


class _Editor:
    def __init__(self, sandbox: Sandbox, limit: int, max_bytes: int) -> None:
        self._sandbox, self._limit, self._max_bytes = sandbox, limit, max_bytes

    async def view(self, path: str, start: int | None, end: int | None) -> str:
        look = await self._look(path)
        if look[0] == "d":
            if start is not None or end is not None:
                raise ToolError(f"{path} is a folder, and has no lines")
            return _folder(path, look[1:])
        read = await self._text(path, look)
        lines = read.lines
        first, last = 1 if start is None else start, len(lines) if end is None else end
        if not lines:
            return f"{path} is empty"
        if not 1 <= first <= len(lines) or last < first:
            raise ToolError(f"{path} has {len(lines)} lines; there are no lines {first} to {last}")
        return self._numbered(read, first, min(last, len(lines)))

    async def create(self, path: str, text: str) -> str:
        look = await self._look(path, missing=True)
        if look and look[0] != "f":
            raise ToolError(f"{path} is a folder or no regular file")
        mode = int(look[1], 8) if look else 0o644
        await self._write(path, Text(text, mode=mode))
        lines = len(Text(text).lines)
        how = "Replaced" if look else "Wrote"
        return f"{how} {path}: {lines} line{'s' * (lines != 1)}."

    async def replace(self, path: str, old: str, new: str) -> str:
        if not old:
            raise ToolError("old is empty: say what to replace, or use insert")
        read = await self._text(path, await self._look(path))
        old, new = read.put(old), read.put(new)
        if old == new:
            raise ToolError("old and new are the same; nothing was changed")
        found = places(read.text, old)
        if len(found) != 1:
            raise ToolError(_not_once(path, read.text, old, found))
        changed = read._replace(text=read.text[: found[0]] + new + read.text[found[0] + len(old) :])
        await self._write(path, changed)
        return self._changed(path, changed, found[0], new)

    async def insert(self, path: str, line: int, text: str) -> str:
        read = await self._text(path, await self._look(path))
        count = len(read.lines)
        if not 0 <= line <= count:
            raise ToolError(f"{path} has {count} lines; text can come after line 0 to {count}, not {line}")
        new = read.put(text)
        changed = read._replace(text=inserted(read.text, line, new))
        await self._write(path, changed)
        at = sum(len(one) + 1 for one in changed.lines[:line])
        return self._changed(path, changed, at, new.removesuffix("\n"))

    async def _look(self, path: str, *, missing: bool = False) -> list[str]:
        folder, name = posixpath.split(posixpath.normpath(path))
        command = ["python3", "-I", "-S", "-c", _LOOK, f"./{name}", str(ENTRIES)]
        found = await self._sandbox.exec(command, cwd=folder or ".", seconds=SECONDS)
        parts = found.stdout.split("\0")
        if found.ok and parts[0] in ("d", "?"):
            return parts
        if found.ok and parts[0] == "f" and len(parts) == 3 and parts[1].isdecimal() and parts[2].isdecimal():
            return parts
        if found.ended:
            raise ToolError(f"the sandbox has ended and nothing more can be run in it: {found.ended}")
        problem = found.stderr.strip().rpartition("\n")[2][:300]
        if "No such file or directory" in problem:
            if missing:
                return []
            raise ToolError(f"there is no {path}")
        raise ToolError(f"{path} cannot be looked at: {problem or 'nobody says why'}")

    async def _text(self, path: str, look: list[str]) -> Text:
        if look[0] != "f":
            raise ToolError(f"{path} is {'a folder' if look[0] == 'd' else 'no regular file'}")
        if int(look[2]) > self._max_bytes:
            raise ToolError(
                f"{path} has {look[2]} bytes, and files of at most {self._max_bytes} are read here: use "
                "another way to see a part of it"
            )
        read = read_text(await self._sandbox.read(path, limit=self._max_bytes), int(look[1], 8))
        if read is None:
            raise ToolError(f"{path} is a binary file, or no UTF-8: it cannot be shown or changed here")
        return read

    async def _write(self, path: str, text: Text) -> None:
        try:
            data = text.data
        except UnicodeEncodeError:
            raise ToolError("the text holds half of a surrogate pair, which no file can hold") from None
        if len(data) > self._max_bytes:
            raise ToolError(f"{path} would have {len(data)} bytes, and at most {self._max_bytes} are written")
        await self._sandbox.write(path, data, mode=text.mode)

    def _changed(self, path: str, changed: Text, at: int, new: str) -> str:
        lines = len(changed.lines)
        first = changed.text.count("\n", 0, at) + 1
        last = first + new.count("\n")
        start, end = max(1, first - AROUND), min(lines, last + AROUND)
        if start > end:
            return f"Changed {path}: it is empty now."
        return f"Changed {path}:\n{self._numbered(changed, start, end)}"

    def _numbered(self, read: Text, first: int, last: int) -> str:
        lines, left = read.lines, self._limit
        shown: list[str] = []
        for number in range(first, last + 1):
            line = lines[number - 1]
            if len(line) > LINE:
                line = f"{line[:LINE]}… [{len(line) - LINE} more characters]"
            row = f"{number:6}\t{line}"
            left -= len(row) + 1
            if left < 0 and shown:
                shown.append(f"[lines {first} to {number - 1} of {len(lines)}; start and end show others]")
                return "\n".join(shown)
            shown.append(row)
        if last == len(lines) and not read.text.endswith("\n"):
            shown.append("[no line end after the last line]")
        return "\n".join(shown)


def _needed(command: str, name: str, value: str | None) -> str:
    if value is None:
        raise ToolError(f"{command} needs {name}")
    return value


def _folder(path: str, entries: list[str]) -> str:
    shown = [name.encode("unicode_escape").decode() if not name.isprintable() else name for name in entries]
    more = [f"[more than {ENTRIES} entries]"] if len(shown) > ENTRIES else []
    return "\n".join([f"{path} holds:", *shown[:ENTRIES], *more]) if shown else f"{path} is an empty folder"


def _not_once(path: str, text: str, old: str, found: list[int]) -> str:
    if found:
        numbers = [text.count("\n", 0, at) + 1 for at in found[:PLACES]]
        more = ", …" if len(found) > PLACES else ""
        return (
            f"old stands in {path} {len(found)} times, beginning in the lines "
            f"{', '.join(map(str, numbers))}{more}; nothing was changed: add lines around the one you mean"
        )
    first = next((line.strip() for line in old.split("\n") if line.strip()), "")
    near = [n for n, line in enumerate(text.split("\n"), 1) if first and first in line][:3]
    hint = f"; its first words stand in line {', '.join(map(str, near))}" if near else ""
    return f"old does not stand in {path}{hint}; nothing was changed: view the file and copy exactly"
