"""A pager of episodes for a terminal: the list, and each episode turn by turn or token by token.

Invariant: the terminal is left as it was found, however the pager ends; the screen is redrawn from the state
after each key, and what is shown was made by :mod:`agentgym.viewer.episodes`.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import sys
import termios
import tty
from collections.abc import Callable, Iterator, Sequence

from rich.console import Console, RenderableType
from rich.segment import Segment
from rich.text import Text

from agentgym.trajectory import Trajectory
from agentgym.viewer import episodes
from agentgym.viewer.terminal import untrusted

_SEQUENCE = re.compile(rb"\x1b(?:\[[0-9;]*[A-Za-z~]|O[A-Z])|[\xc0-\xff][\x80-\xbf]*|.", re.DOTALL)
_NAMES = {
    b"\x1b[A": "up", b"\x1b[B": "down", b"\x1b[C": "right", b"\x1b[D": "left", b"\x1bOA": "up",
    b"\x1bOB": "down", b"\x1bOC": "right", b"\x1bOD": "left", b"\x1b[5~": "page up", b"\x1b[6~": "page down",
    b"\x1b[H": "home", b"\x1b[F": "end", b"\x1b[1~": "home", b"\x1b[4~": "end", b"\x1b": "escape",
    b"\r": "enter", b"\n": "enter", b"\x7f": "backspace", b"\x08": "backspace", b"\x04": "q",
}  # fmt: skip
_COMMANDS = {
    "j": "down", "k": "up", " ": "page down", "b": "page up", "g": "home", "G": "end",
    "n": "next", "right": "next", "p": "previous", "left": "previous",
    "l": "list", "escape": "list", "backspace": "list",
}  # fmt: skip
_ESCAPE_SECONDS = 0.05
_RESIZE_SECONDS = 0.25

Keys = Callable[[float | None], str]


class Pager:
    """Shows episodes and answers keys.

    Args:
        trajectories: What to show, at least one.
        title: Shown in the status line.
        decoder: As :func:`agentgym.viewer.episodes.tokens`.
        console: Where to draw.
        opened: Row of the episode to start with; the list otherwise.
        tokens: Start with the token view of that episode.
    """

    def __init__(
        self,
        trajectories: Sequence[Trajectory],
        title: str,
        *,
        decoder: episodes.Decoder,
        console: Console,
        opened: int | None = None,
        tokens: bool = False,
    ) -> None:
        self._trajectories, self._title, self._console = trajectories, title, console
        self._decoder = decoder
        self._row, self._open = opened or 0, opened is not None
        self._tokens = tokens and self._open
        self._top = 0
        self._sought = self._message = ""
        self._rendered: tuple[object, list[list[Segment]]] = None, []

    def run(self) -> None:
        """Until the person quits."""
        with (
            _keyboard(sys.stdin.fileno()) as keys,
            self._console.screen(),
            contextlib.suppress(KeyboardInterrupt),
        ):
            shown: object = None
            while True:
                state = (self._row, self._open, self._tokens, self._top, self._message, self._console.size)
                if state != shown:
                    self._draw()
                    shown = state
                key = keys(_RESIZE_SECONDS)
                if key == "q":
                    return
                if key == "/":
                    self._search(keys)
                    shown = None
                elif key:
                    self._message = ""
                    self._answer(_COMMANDS.get(key, key))

    def _answer(self, command: str) -> None:
        page = max(1, self._height - 1)
        far = 10**9
        step = {"down": 1, "up": -1, "page down": page, "page up": -page, "home": -far, "end": far}.get(
            command
        )
        if step is not None and self._open:
            self._top = min(max(self._top + step, 0), max(0, len(self._lines()) - self._height))
        elif step is not None:
            self._go(self._row + step)
        elif command in ("next", "previous"):
            self._go(self._row + (1 if command == "next" else -1))
        elif command == "enter":
            self._open, self._top = True, 0
        elif command == "list":
            self._open, self._tokens, self._top = False, False, 0
        elif command == "t":
            self._console.update_screen_lines([self._status("reading the tokens …")], y=self._height)
            self._tokens, self._open, self._top = not (self._open and self._tokens), True, 0

    def _go(self, row: int) -> None:
        row = min(max(row, 0), len(self._trajectories) - 1)
        if row != self._row:
            self._row, self._top = row, 0

    def _search(self, keys: Keys) -> None:
        """Read what to look for, and go to the next place that has it."""
        typed = ""
        while True:
            self._draw(f"/{typed}")
            key = keys(None)
            if key == "enter":
                break
            if key == "escape":
                return
            if key == "backspace":
                typed = typed[:-1]
            elif len(key) == 1 and key.isprintable():
                typed += key
        self._sought = (typed or self._sought).casefold()
        if not self._sought:
            return
        here, texts = (self._top, self._texts()) if self._open else (self._row, self._summaries())
        found = [i for i, text in enumerate(texts) if self._sought in text.casefold()]
        after = next((i for i in found if i > here), found[0] if found else None)
        if after is None:
            self._message = f"{self._sought!r} is not here"
        elif self._open:
            self._top = min(after, max(0, len(texts) - self._height))
            self._message = f"{self._sought!r}: line {after + 1}"
        else:
            self._row = after

    def _texts(self) -> list[str]:
        return ["".join(segment.text for segment in line) for line in self._lines()]

    def _summaries(self) -> list[str]:
        return ["  ".join(episodes.summary(trajectory)) for trajectory in self._trajectories]

    # Drawing --------------------------------------------------------------------------------

    @property
    def _height(self) -> int:
        return max(1, self._console.size.height - 1)

    def _draw(self, prompt: str | None = None) -> None:
        width, _ = self._console.size
        if self._open:
            lines = self._lines()
            self._top = min(self._top, max(0, len(lines) - self._height))
            lines = lines[self._top : self._top + self._height]
        else:
            lines = self._list()
        lines = Segment.set_shape(lines, width, self._height)
        self._console.update_screen_lines([*lines, self._status(prompt)])

    def _lines(self) -> list[list[Segment]]:
        """The open episode, rendered; kept until something else is shown."""
        key = (self._row, self._tokens, self._console.size.width)
        if self._rendered[0] != key:
            trajectory = self._trajectories[self._row]
            shown = (
                episodes.tokens(trajectory, self._decoder) if self._tokens else episodes.episode(trajectory)
            )
            self._rendered = key, self._render(shown)
        return self._rendered[1]

    def _list(self) -> list[list[Segment]]:
        # Only what fits is rendered: a run may hold tens of thousands of episodes.
        room = max(1, self._height - 1)
        first = min(max(0, self._row - room // 2), max(0, len(self._trajectories) - room))
        rows = self._trajectories[first : first + room]
        return self._render(episodes.index(rows, marked=self._row - first))

    def _render(self, renderable: RenderableType) -> list[list[Segment]]:
        options = self._console.options.update(width=self._console.size.width, height=None)
        return self._console.render_lines(renderable, options)

    def _status(self, prompt: str | None) -> list[Segment]:
        width = self._console.size.width
        if prompt is not None:
            text = untrusted(prompt)
        else:
            text = untrusted(f"{self._title}  {self._row + 1} of {len(self._trajectories)}  ", "bold")
            text.append_text(untrusted(self._message or self._help()))
        text.truncate(width, pad=True)
        text.stylize("reverse")
        return self._render(Text.assemble(text, end=""))[0]

    def _help(self) -> str:
        if self._open:
            other = "t text" if self._tokens else "t tokens"
            return f"n next  p previous  space page  / search  {other}  l list  q quit"
        return "enter open  j k move  / search  t tokens  q quit"


@contextlib.contextmanager
def _keyboard(terminal: int) -> Iterator[Keys]:
    """Keys one at a time, unechoed."""
    before = termios.tcgetattr(terminal)
    waiting: list[str] = []

    def read(seconds: float | None) -> str:
        """The next key's name, or an empty string after ``seconds``."""
        if not waiting:
            if not select.select([terminal], [], [], seconds)[0]:
                return ""
            data = os.read(terminal, 1024)
            # An arrow's bytes may come apart; a lone Escape has nothing behind it.
            while (
                data.endswith((b"\x1b", b"\x1b[", b"\x1bO"))
                and select.select([terminal], [], [], _ESCAPE_SECONDS)[0]
            ):
                data += os.read(terminal, 1024)
            if not data:  # the terminal is gone
                return "q"
            for key in _SEQUENCE.findall(data):
                waiting.append(_NAMES.get(key) or key.decode(errors="ignore"))
        return waiting.pop(0)

    tty.setcbreak(terminal)
    try:
        yield read
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)
