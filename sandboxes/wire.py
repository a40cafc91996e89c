"""What a sandbox host and its clients say to each other, in WebSocket messages.

Invariants: a message is a JSON object and bytes, and nothing that arrives is ever executed, unpickled or
taken for a path before it was checked; an error keeps its kind across the wire; a folder travels as one
message a file, and what lands is a new folder, out of which no name and no link leads.

A message is the object's length (4 bytes, big endian), the object, and the bytes. Bytes that are too long for
one message go ahead in parts: messages with the same number ``n`` and ``part``.
"""

from __future__ import annotations

import json
import os
import posixpath
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from agentgym.errors import AgentGymError, SandboxFailed, UsageError
from agentgym.sandboxes.base import MIB, PathRefused, SandboxEnded
from agentgym.sandboxes.served import walked

PIECE = MIB
LONGEST = 4 * MIB
"""Longest message."""

PATH = "/sandboxes"
Head = dict[str, Any]
Answer = tuple[Head, bytes]

RESULT = ("return_code", "timed_out", "ended", "cut_stdout", "cut_stderr", "seconds")
"""What of the result of a command travels in the object; its output travels in the bytes."""


class WireError(AgentGymError):
    """The other side does not keep to the protocol."""


def messages(head: Head, blob: bytes = b"") -> Iterator[bytes]:
    """An object and its bytes as messages, in their order."""
    while len(blob) > PIECE:
        yield _message({"n": head.get("n", 0), "part": True}, blob[:PIECE])
        blob = blob[PIECE:]
    yield _message(head, blob)


def _message(head: Head, blob: bytes) -> bytes:
    body = json.dumps(head, separators=(",", ":")).encode()
    if len(body) > LONGEST - PIECE - 4:
        raise UsageError(
            f"a request of {len(body)} bytes is more than a sandbox host takes",
            hint="send long content as a file or on the standard input",
        )
    return len(body).to_bytes(4, "big") + body + blob


class Gathering:
    """Messages as they come, back to objects and their bytes.

    Args:
        most: Bytes that may wait in parts.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._parts: dict[int, list[bytes]] = {}
        self._held = 0

    def take(self, data: bytes) -> Answer | None:
        """The object and bytes that ``data`` completes.

        Raises:
            WireError: It is no message, or more waits than may.
        """
        length = int.from_bytes(data[:4], "big")
        try:
            head = json.loads(data[4 : 4 + length])
            number = int(head.get("n", 0))
        except (ValueError, AttributeError, TypeError, RecursionError) as error:
            raise WireError("a message is no object") from error
        blob = data[4 + length :]
        if head.get("part"):
            self._held += len(blob)
            if self._held > self._most:
                raise WireError(f"more than {self._most} bytes wait for their message")
            self._parts.setdefault(number, []).append(blob)
            return None
        if parts := self._parts.pop(number, None):
            self._held -= sum(map(len, parts))
            blob = b"".join([*parts, blob])
        return head, blob


# Errors ----------------------------------------------------------------------------------------


def told(error: BaseException) -> Head:
    """An error for the wire."""
    if isinstance(error, SandboxEnded):
        return {"kind": "ended", "message": error.why, "hint": ""}
    if isinstance(error, TimeoutError):
        return {"kind": "timeout", "message": str(error), "hint": ""}
    if not isinstance(error, AgentGymError):
        return {"kind": "failed", "message": f"the host met {type(error).__name__}: {error}", "hint": ""}
    kind = (
        "path" if isinstance(error, PathRefused) else "usage" if isinstance(error, UsageError) else "failed"
    )
    return {"kind": kind, "message": error.message, "hint": error.hint}


def raised(error: Any) -> Exception:
    """The error that :func:`told` wrote."""
    told = error if isinstance(error, dict) else {}
    message, hint = str(told.get("message", "")), str(told.get("hint", ""))
    match told.get("kind"):
        case "ended":
            return SandboxEnded(message)
        case "timeout":
            return TimeoutError(message)
        case "path":
            return PathRefused(message, hint=hint)
        case "usage":
            return UsageError(message, hint=hint)
    return SandboxFailed(message or "the sandbox host failed and does not say how", hint=hint)


# Folders ---------------------------------------------------------------------------------------


def laden(source: Path) -> Iterator[tuple[list[Any], bytes]]:
    """A file, or what is in a folder, as entries and their bytes; long files are several entries.

    Raises:
        UsageError: It is not there, or holds what cannot be copied.
    """
    for entry in walked(source):
        if entry.kind == "file":
            with entry.place.open("rb") as content:
                first = True
                while (piece := content.read(PIECE)) or first:
                    yield ["file" if first else "more", entry.name, entry.mode, ""], piece
                    first = False
        else:
            yield [entry.kind, entry.name, entry.mode, entry.link], b""


class Landing:
    """Makes what entries say, as a new file or folder.

    Args:
        root: Where; must not be there.
        max_bytes: How much it may hold.
        max_files: How many files, folders and links.

    Attributes:
        problem: What went wrong first, for who has to go on taking.
    """

    problem: Exception | None = None

    def __init__(self, root: Path, max_bytes: int, max_files: int) -> None:
        self._root, self._bytes, self._files = root, max_bytes, max_files
        self._links: dict[str, str] = {}
        self._modes: list[tuple[Path, int]] = []
        self._open: str | None = None

    def take(self, entry: Any, blob: bytes) -> None:
        """Make what one entry says.

        Raises:
            PathRefused: It cannot be, or is more than may be.
        """
        try:
            kind, name, mode, link = entry
            steps = str(name).split("/")
            known = kind in ("file", "more", "folder", "link") and isinstance(mode, int)
            here = name in ("", ".") and kind != "link"
        except (TypeError, ValueError):
            known, here, steps = False, False, [""]
        if not known or (not here and any(step in ("", ".", "..") or "\0" in step for step in steps)):
            raise PathRefused("what arrives is no file, folder or link")
        self._bytes -= len(blob)
        self._files -= kind != "more"
        if self._bytes < 0 or self._files < -1:
            raise PathRefused("it is more than may be copied")
        place = self._root if here else self._root / name
        try:
            if kind == "folder":
                place.mkdir(parents=True, exist_ok=True)
                self._modes.append((place, mode & 0o777 | 0o700))
            elif kind == "link":
                self._links[name] = str(link)
            else:
                if kind == "more" and self._open != name:
                    raise PathRefused("what arrives is no file, folder or link")
                place.parent.mkdir(parents=True, exist_ok=True)
                flags = os.O_APPEND if kind == "more" else os.O_CREAT | os.O_EXCL
                fd = os.open(place, os.O_WRONLY | os.O_NOFOLLOW | flags, 0o600)
                with os.fdopen(fd, "wb") as sink:
                    sink.write(blob)
                    os.fchmod(fd, mode & 0o755 | 0o600)
                self._open = name
        except (FileExistsError, FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            raise PathRefused(f"what arrives contradicts itself: {error}") from error

    def finish(self) -> None:
        """Make the links, last: nothing is written through them; raises as :meth:`take`."""
        try:
            for name, link in self._links.items():
                if led_to(name, link, self._links) is not None:
                    (self._root / name).parent.mkdir(parents=True, exist_ok=True)
                    (self._root / name).symlink_to(link)
            for place, mode in reversed(self._modes):
                place.chmod(mode)
        except (FileExistsError, FileNotFoundError, NotADirectoryError, ValueError) as error:
            raise PathRefused(f"what arrives contradicts itself: {error}") from error
        if not os.path.lexists(self._root):
            raise PathRefused("nothing arrived")


def led_to(name: str, link: str, links: Collection[str]) -> str | None:
    """What a link of a folder leads to, relative to that folder; ``None``: out of it, or nobody can tell.

    Args:
        name: Where the link is.
        link: What it says.
        links: The names of all links there. One that leads through another is refused: a step up from there
            is not a step up in the name.
    """
    if link.startswith("/"):
        return None
    steps: list[str] = []
    words = [word for word in f"{posixpath.dirname(name)}/{link}".split("/") if word not in ("", ".")]
    for number, word in enumerate(words):
        if word == "..":
            if not steps:
                return None
            steps.pop()
        else:
            steps.append(word)
        if number < len(words) - 1 and "/".join(steps) in links:
            return None
    return "/".join(steps) or "."
