"""Messages and their content: what lies between an observation and prompt tokens.

Invariant: content is an ordered tuple of parts and is never mutated; ``env.content(observation)`` is the
only way from an observation to a message.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True, slots=True)
class TextPart:
    """A piece of text."""

    text: str


@dataclass(frozen=True, slots=True)
class ImagePart:
    """An encoded image.

    Attributes:
        data: The encoded bytes (PNG unless ``media_type`` says otherwise).
        media_type: MIME type.
    """

    data: bytes
    media_type: str = "image/png"

    @property
    def digest(self) -> str:
        """SHA-256 of the bytes, the blob's name in the journal."""
        return hashlib.sha256(self.data).hexdigest()


Part = TextPart | ImagePart
Content = tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call of a tool, as parsed from a completion.

    Attributes:
        name: The tool's name.
        arguments: JSON object of arguments.
        id: The caller's id, where the dialect has one.
    """

    name: str
    arguments: dict[str, Any]
    id: str | None = None


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation."""

    role: Role
    content: Content

    @classmethod
    def of(cls, role: Role, text: str) -> Message:
        """A message with one text part."""
        return cls(role, (TextPart(text),))

    @property
    def text(self) -> str:
        """The text parts, joined by newlines."""
        return text_of(self.content)

    def to_template(self) -> dict[str, Any]:
        """The dictionary that a Hugging Face chat template expects (a plain string for text alone)."""
        if all(isinstance(part, TextPart) for part in self.content):
            return {"role": self.role, "content": self.text}
        return {
            "role": self.role,
            "content": [
                {"type": "text", "text": p.text} if isinstance(p, TextPart) else {"type": "image"}
                for p in self.content
            ],
        }


def as_content(value: str | Part | Sequence[Part]) -> Content:
    """``value`` as a tuple of parts."""
    if isinstance(value, str):
        return (TextPart(value),)
    if isinstance(value, TextPart | ImagePart):
        return (value,)
    return tuple(value)


def text_of(content: Content) -> str:
    """The text parts of ``content``, joined by newlines."""
    return "\n".join(p.text for p in content if isinstance(p, TextPart))
