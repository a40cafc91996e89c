from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentgym.messages import ImagePart, Message, TextPart, as_content, text_of


def test_content_is_a_tuple_whatever_it_came_from() -> None:
    text, image = TextPart("a"), ImagePart(b"\x89PNG")
    assert as_content("a") == (text,)
    assert as_content(image) == (image,)
    assert as_content([text, image]) == (text, image)


@given(st.text())
def test_text_goes_through_unchanged(text: str) -> None:
    message = Message.of("user", text)
    assert message.text == text
    assert message.to_template() == {"role": "user", "content": text}


def test_a_template_gets_parts_in_order_once_there_is_an_image() -> None:
    image = ImagePart(b"\x89PNG")
    message = Message("user", (TextPart("before"), image, TextPart("after")))
    assert message.text == text_of(message.content) == "before\nafter"
    assert message.to_template()["content"] == [
        {"type": "text", "text": "before"},
        {"type": "image"},
        {"type": "text", "text": "after"},
    ]


def test_an_image_is_named_by_its_bytes() -> None:
    assert ImagePart(b"abc").digest == hashlib.sha256(b"abc").hexdigest()
    assert ImagePart(b"abc").digest != ImagePart(b"abd").digest


def test_parts_and_messages_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        TextPart("a").text = "b"  # type: ignore[misc]
    with pytest.raises(AttributeError):
        Message.of("user", "a").role = "tool"  # type: ignore[misc]
