"""A person at a terminal.

Invariants: what an environment says is shown as text, never as markup or as an escape sequence; leaving is
no failure of the policy.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator, Sequence

from rich.console import Console

from agentgym.actions import Parser, PlainParser
from agentgym.errors import UsageError
from agentgym.messages import ImagePart, TextPart
from agentgym.policies.base import Completion, Policy, Request
from agentgym.viewer.terminal import untrusted


class PlayerLeft(KeyboardInterrupt):
    """The person ended the input (Ctrl-D). As Ctrl-C, so that nothing on its way takes it for a failure."""


class HumanPolicy(Policy):
    """Shows each observation and the admissible actions, and reads an action; a number picks a listed one.

    Reading blocks the event loop, on purpose: a thread that waits for a terminal cannot be interrupted, and
    would keep the program from ending.

    Args:
        parser: The format that the action is written in; the person types the action alone.
        console: Where to show.
        read: Reads a line after a prompt; raises ``EOFError`` at the end of input.
    """

    name = "human"

    def __init__(
        self,
        parser: Parser | None = None,
        console: Console | None = None,
        read: Callable[[str], str] = input,
    ) -> None:
        self._parser, self._console, self._read = parser or PlainParser(), console or Console(), read

    async def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Ask for an action.

        Raises:
            UsageError: Several episodes ask at once.
            PlayerLeft: The input ended.
            KeyboardInterrupt: Ctrl-C.
        """
        if len(requests) != 1:
            raise UsageError("a person plays one episode at a time", hint="set concurrency to 1")
        actions = requests[0].turn.admissible_actions or ()
        self._show(requests[0], actions)
        while True:
            answer = self._ask(actions)
            try:
                return [Completion(self._parser.format(answer))]
            except UsageError as error:  # a slip of the person's, who can type again
                self._console.print(untrusted(str(error), "red"))

    def _show(self, request: Request, actions: Sequence[str]) -> None:
        console = self._console
        console.print()
        for part in request.turn.observation:
            if isinstance(part, TextPart):
                console.print(untrusted(part.text))
            elif isinstance(part, ImagePart):
                console.print(untrusted(f"[{part.media_type}, {len(part.data)} bytes]", "dim"))
        for number, action in enumerate(actions, 1):
            console.print(untrusted(f"{number:>4}  {action}", "cyan"))

    def _ask(self, actions: Sequence[str]) -> str:
        answer = ""
        while not answer:
            try:
                with _interruptible():
                    answer = self._read("> ").strip()
            except EOFError:
                self._console.print()
                raise PlayerLeft("the input ended") from None
        if answer.isascii() and answer.isdecimal() and answer not in actions:
            picked = int(answer) if len(answer) < 9 else 0
            if 1 <= picked <= len(actions):
                return actions[picked - 1]
        return answer


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C ends the reading: asyncio's own handler would only note it and let the reading go on."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
