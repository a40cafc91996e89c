from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agentgym.conversation import Conversation, extend
from agentgym.messages import Message, TextPart
from agentgym.policies.base import Completion

pytest.importorskip("transformers")
from agentgym.policies.templates import HuggingFaceRenderer

KEEPING = ("chatml", "headers", "strip", "tools")
REWRITING = ("thinking", "reorder", "count")


@dataclass(frozen=True)
class Step:
    """One turn as hypothesis draws it: what is observed, what is sampled, whether the turn is ended."""

    observation: str
    token_ids: tuple[int, ...]
    ended: bool


# The special tokens lie outside this range.
tokens = st.lists(st.integers(3, 383), max_size=12).map(tuple)
texts = st.one_of(
    st.text(st.characters(exclude_categories=()), max_size=20),
    st.sampled_from(["", " ", "\n", "<|im_end|>", "<|im_start|>assistant\n", "</think>", "ababab", "a\r\nb"]),
)
steps = st.lists(st.builds(Step, texts, tokens, st.booleans()), min_size=1, max_size=5)
thoughts = st.sampled_from(
    ["<think>a</think>\n\ngo", "go", "<think>", "</think>", " x ", "</think></think>y\n"]
)


@pytest.fixture(scope="session")
def renderers(tiny_tokenizer: Any, chat_templates: dict[str, str]) -> dict[str, HuggingFaceRenderer]:
    return {name: HuggingFaceRenderer(tiny_tokenizer, template=text) for name, text in chat_templates.items()}


def sample(renderer: HuggingFaceRenderer, token_ids: Sequence[int], ended: bool) -> Completion:
    """A completion as a policy hands it over."""
    end = tuple(renderer.encode(renderer.end_of_turn)) if ended else ()
    ids = (*token_ids, *end)
    text = renderer.decode(token_ids)
    return Completion(text, ids, tuple(-0.5 for _ in ids), "stop" if ended else "length")


def play(conversation: Conversation, renderer: HuggingFaceRenderer, drawn: Sequence[Step]) -> None:
    """Run the steps, and hold every prompt to the invariant of its segment."""
    before: tuple[int, ...] = ()
    for step in drawn:
        known = len(conversation.segments)
        prompt = conversation.observe([Message.of("user", step.observation)])
        assert prompt == tuple(conversation.segments[-1].token_ids)
        if len(conversation.segments) == known:
            assert prompt[: len(before)] == before, "a prefix was re-tokenised"
        completion = sample(renderer, step.token_ids, step.ended)
        segment, (start, end) = conversation.complete(completion)
        held = conversation.segments[segment]
        assert segment == len(conversation.segments) - 1 and (start, end) == (len(prompt), len(held))
        assert tuple(held.token_ids[start:end]) == completion.token_ids, "sampled tokens were re-encoded"
        assert held.loss_mask[start:end] == [True] * (end - start)
        before = tuple(held.token_ids)
    sampled = sum(len(sample(renderer, s.token_ids, s.ended).token_ids) for s in drawn)
    assert sum(sum(segment.loss_mask) for segment in conversation.segments) == sampled
    for held in conversation.segments:
        assert len(held.token_ids) == len(held.loss_mask) == len(held.logp_rollout)
        assert [bool(p) for p in held.logp_rollout] == held.loss_mask
    assert len(conversation.segments) == 1 + len(conversation.forks), "a segment without a recorded fork"
    assert all(reason for _, reason in conversation.forks)


wild = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("name", KEEPING)
@given(drawn=steps, system=st.sampled_from(["", "Play.", " \n"]))
@wild
def test_template_that_keeps_its_prefix_gives_one_segment(
    renderers: dict[str, HuggingFaceRenderer], name: str, drawn: list[Step], system: str
) -> None:
    conversation = Conversation(renderers[name], system=system)
    play(conversation, renderers[name], drawn)
    assert len(conversation.segments) == 1


@pytest.mark.parametrize("name", REWRITING)
@given(drawn=steps)
@wild
def test_template_that_rewrites_forks_explicitly(
    renderers: dict[str, HuggingFaceRenderer], name: str, drawn: list[Step]
) -> None:
    conversation = Conversation(renderers[name])
    play(conversation, renderers[name], drawn)
    if name == "count":  # the others may by chance render what stands there already
        assert [turn for turn, _ in conversation.forks] == list(range(1, len(drawn)))


@given(words=st.lists(thoughts, min_size=2, max_size=5), roles=st.lists(st.sampled_from(["user", "tool"])))
@wild
def test_dropped_thoughts_fork_and_kept_ones_do_not(
    renderers: dict[str, HuggingFaceRenderer], words: list[str], roles: list[Any]
) -> None:
    renderer = renderers["thinking"]
    conversation = Conversation(renderer)
    conversation.observe([Message.of("user", "q")])
    history = [Message.of("user", "q")]
    for word, role in zip(words, roles, strict=False):
        conversation.complete(sample(renderer, renderer.encode(word), True))
        history += [Message.of("assistant", word), Message.of(role, "o")]
        prompt = conversation.observe(history[-1:])
        if conversation.forks and conversation.forks[-1][0] == len(history) // 2:
            # A new segment is what the template makes of the whole history.
            assert renderer.decode(prompt) == renderer.render(history, generation_prompt=True)
    assert len(conversation.segments) == 1 + len(conversation.forks)


@given(drawn=steps)
@wild
def test_tokens_read_as_the_template_renders(
    renderers: dict[str, HuggingFaceRenderer], drawn: list[Step]
) -> None:
    renderer = renderers["chatml"]
    conversation, history, prompt = Conversation(renderer), list[Message](), ()
    for step in drawn:
        new = Message.of("user", step.observation.encode("utf-8", "replace").decode())
        prompt = conversation.observe([new])
        completion = sample(renderer, step.token_ids, step.ended)
        conversation.complete(completion)
        history += [new, Message.of("assistant", completion.text)]
    if not any("\ufffd" in m.text for m in history):  # sampled bytes that are no character
        assert renderer.decode(prompt) == renderer.render(history[:-1], generation_prompt=True)


def test_ambiguous_pieces_stay_as_sampled(renderers: dict[str, HuggingFaceRenderer]) -> None:
    renderer = renderers["chatml"]
    pieces = [token for letter in "ababab" for token in renderer.encode(letter)]
    assert renderer.encode("ababab") != pieces, "the text must have a shorter encoding"
    conversation = Conversation(renderer)
    start = len(conversation.observe([Message.of("user", "q")]))
    conversation.complete(sample(renderer, pieces, True))
    prompt = conversation.observe([Message.of("user", "r")])
    assert list(prompt[start : start + 6]) == pieces
    assert renderer.decode(prompt).count("ababab") == 1


@pytest.mark.parametrize("ended", [True, False])
def test_end_of_turn_is_written_once(renderers: dict[str, HuggingFaceRenderer], ended: bool) -> None:
    renderer = renderers["chatml"]
    conversation = Conversation(renderer)
    conversation.observe([Message.of("user", "q")])
    conversation.complete(sample(renderer, renderer.encode("go"), ended))
    text = renderer.decode(conversation.observe([Message.of("user", "r")]))
    assert text.endswith("assistant\ngo<|im_end|>\n<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\n")
    assert conversation.segments[0].loss_mask.count(True) == len(renderer.encode("go")) + ended


def test_whitespace_that_a_template_trims_is_no_rewrite(renderers: dict[str, HuggingFaceRenderer]) -> None:
    before, new = [Message.of("user", "q")], [Message.of("user", "r")]
    extension = extend(renderers["strip"], before, "  go \n", new, sampled_end=True)
    assert extension.text == "\n<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\n"


def test_fork_says_why(renderers: dict[str, HuggingFaceRenderer]) -> None:
    before, new = [Message.of("user", "q")], [Message.of("user", "r")]
    dropped = extend(renderers["thinking"], before, "<think>x</think>go", new, sampled_end=True)
    assert dropped.text is None and "the assistant's earlier text" in dropped.reason
    moved = extend(renderers["reorder"], before, "go", new, sampled_end=True)
    assert moved.text is None and "the prompt of an earlier turn" in moved.reason


def test_turn_layout_opens_a_segment_a_turn(renderers: dict[str, HuggingFaceRenderer]) -> None:
    renderer = renderers["chatml"]
    conversation = Conversation(renderer, system="Play.", layout="turn")
    for word in ("one", "two"):
        prompt = renderer.decode(conversation.observe([Message.of("user", word)]))
        conversation.complete(sample(renderer, renderer.encode("go"), True))
        assert prompt == renderer.render(
            [Message.of("system", "Play."), Message.of("user", word)], generation_prompt=True
        )
    assert len(conversation.segments) == 2 and not conversation.forks


def test_instruction_opens_the_conversation_once(renderers: dict[str, HuggingFaceRenderer]) -> None:
    renderer = renderers["chatml"]
    conversation = Conversation(renderer, instruction="Find the coin.")
    opening = renderer.decode(conversation.read((TextPart("A hall."),)))
    assert "user\nFind the coin.\nA hall.<" in opening
    conversation.complete(sample(renderer, renderer.encode("go"), True))
    later = renderer.decode(conversation.read((TextPart("A cellar."),), role="tool"))
    assert later.count("Find the coin.") == 1 and "<tool_response>\nA cellar." in later
    repeated = Conversation(renderer, instruction="Find the coin.")
    assert renderer.decode(repeated.read((TextPart("Find the coin. A hall."),))).count("Find the coin.") == 1
