"""From messages to prompt tokens, turn by turn, without ever re-encoding what was sampled.

Invariant: within a segment each prompt is the previous prompt, the tokens sampled on it, and new context
tokens: a prefix is never re-tokenised. Where the chat template rewrites history (drops old thoughts, trims,
reorders), a new segment is opened explicitly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from agentgym.messages import Content, Message, Role, TextPart, text_of
from agentgym.policies.base import Completion
from agentgym.trajectory import Segment

Layout = Literal["chat", "turn"]


class Renderer(Protocol):
    """Turns messages into text by a chat template, and text into token ids."""

    def render(self, messages: Sequence[Message], *, generation_prompt: bool) -> str:
        """The template's text; with ``generation_prompt`` it ends where the assistant starts to write.

        Raises:
            TemplateError: The template refuses these messages.
        """

    def encode(self, text: str) -> list[int]:
        """Token ids of template text (special tokens recognised, none added)."""

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of token ids, special tokens included."""

    def with_tools(self, tools: Sequence[Mapping[str, Any]]) -> Renderer:
        """The same renderer, describing tools by their JSON Schemas."""

    @property
    def end_of_turn(self) -> str:
        """The text that a template writes when the assistant's turn ends, e.g. ``<|im_end|>``."""


@dataclass(frozen=True, slots=True)
class Extension:
    """How the next prompt continues the last one: by appended text, or not at all.

    Attributes:
        text: Context text to append after the sampled tokens; ``None`` where the template rewrote history.
        reason: Why it forked, for a person.
    """

    text: str | None
    reason: str = ""


def extend(
    renderer: Renderer, before: Sequence[Message], completion: str, new: Sequence[Message], sampled_end: bool
) -> Extension:
    """What the template appends after ``completion`` to reach the next generation prompt.

    Args:
        renderer: The template.
        before: Messages of the prompt that ``completion`` was sampled on.
        completion: The completion's text without its end-of-turn token.
        new: Messages that follow it.
        sampled_end: The sampled tokens already contain the end-of-turn token.

    Returns:
        The text between the completion and the next assistant turn, or a fork with its reason. Outer white
        space that a template trims from old turns is not a rewrite: the sampled tokens stand.
    """
    prompt = renderer.render(before, generation_prompt=True)
    full = renderer.render([*before, Message.of("assistant", completion), *new], generation_prompt=True)
    for kept in dict.fromkeys((completion, completion.rstrip(), completion.strip())):
        if full.startswith(prompt + kept):
            rest = full[len(prompt) + len(kept) :]
            end = renderer.end_of_turn
            if not rest.lstrip().startswith(end):
                continue
            if sampled_end:
                rest = rest.lstrip()[len(end) :]
            return Extension(rest)
    if not full.startswith(prompt):
        return Extension(None, "the template rewrites the prompt of an earlier turn")
    return Extension(None, "the template rewrites the assistant's earlier text")


class Conversation:
    """The token side of one episode.

    ``read`` (or ``observe``) gives the next prompt's ids, ``complete`` appends what was sampled.

    Args:
        renderer: The policy's template and tokenizer.
        system: System message, or empty.
        instruction: Stands in front of the observation that opens a prompt, unless that repeats it.
        layout: ``chat``: one growing conversation, one segment unless the template forks. ``turn``: each
            turn is a prompt of its own (system, observation), a segment a turn.
    """

    def __init__(
        self, renderer: Renderer, *, system: str = "", instruction: str = "", layout: Layout = "chat"
    ) -> None:
        self.segments: list[Segment] = []
        self.forks: list[tuple[int, str]] = []
        self._renderer, self._instruction, self._layout = renderer, instruction, layout
        self._head = [Message.of("system", system)] if system else []
        self._messages: list[Message] = list(self._head)
        self._last: tuple[list[Message], str, bool] | None = None
        self._turn = -1

    def read(self, content: Content, *, role: Role = "user") -> tuple[int, ...]:
        """Add an observation and return the next completion's prompt ids.

        Args:
            content: The observation.
            role: Role of an observation that answers an action; the opening one is always the user's.
        """
        if self._turn < 0 or self._layout == "turn":
            role = "user"
            if self._instruction and self._instruction not in text_of(content):
                content = (TextPart(self._instruction), *content)
        return self.observe([Message(role, content)])

    def observe(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Add ``messages`` (an observation, a tool's result); return the next completion's prompt ids."""
        self._turn += 1
        extension: Extension | None = None
        if self._layout == "turn":
            self._messages = [*self._head, *messages]
        else:
            if self._last is not None:
                before, completion, sampled_end = self._last
                extension = extend(self._renderer, before, completion, messages, sampled_end)
                if extension.text is None:
                    self.forks.append((self._turn, extension.reason))
                self._messages = [*before, Message.of("assistant", completion), *messages]
            else:
                self._messages = [*self._messages, *messages]
        if extension is not None and extension.text is not None:
            self.segments[-1].append_context(self._renderer.encode(extension.text))
        else:
            self.segments.append(Segment())
            text = self._renderer.render(self._messages, generation_prompt=True)
            self.segments[-1].append_context(self._renderer.encode(text))
        return tuple(self.segments[-1].token_ids)

    def complete(self, completion: Completion) -> tuple[int, tuple[int, int]]:
        """Append a sampled completion; return ``(segment index, token span)``."""
        span = self.segments[-1].append_sampled(completion.token_ids, completion.logprobs)
        end = self._renderer.end_of_turn
        sampled_end = bool(completion.token_ids) and self._renderer.decode(completion.token_ids[-1:]) == end
        self._last = (list(self._messages), completion.text, sampled_end)
        return len(self.segments) - 1, span
