from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest

from agentgym.conversation import Conversation
from agentgym.errors import TemplateError, UsageError
from agentgym.messages import ImagePart, Message, TextPart
from agentgym.policies.base import Completion
from agentgym.policies.templates import HuggingFaceRenderer, diagnose

pytest.importorskip("transformers")

LOOK = {"name": "look", "description": "Look around.", "parameters": {"type": "object", "properties": {}}}
USER, TOOL = Message.of("user", "Hello."), Message.of("tool", "It is dark.")


@pytest.fixture
def renderer(tiny_tokenizer: Any, chat_templates: dict[str, str]) -> Callable[..., HuggingFaceRenderer]:
    def make(name: str, **options: Any) -> HuggingFaceRenderer:
        return HuggingFaceRenderer(tiny_tokenizer, template=chat_templates[name], **options)

    return make


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("chatml", "<|im_end|>"),
        ("headers", "<|eot_id|>"),
        ("strict", "<|eot_id|>"),
        ("thinking", "<|im_end|>"),
    ],
)
def test_end_of_turn_is_found_by_rendering(renderer: Any, name: str, end: str) -> None:
    assert renderer(name).end_of_turn == end


def test_template_without_an_end_token_has_none(tiny_tokenizer: Any) -> None:
    plain = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    assert HuggingFaceRenderer(tiny_tokenizer, template=plain).end_of_turn == ""


def test_renders_as_the_tokenizer_does(renderer: Any) -> None:
    text = renderer("chatml").render([Message.of("system", "s"), USER], generation_prompt=True)
    assert (
        text == "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nHello.<|im_end|>\n<|im_start|>assistant\n"
    )


def test_encoding_recognises_special_tokens_and_adds_none(renderer: Any, tiny_tokenizer: Any) -> None:
    headers = renderer("headers")
    text = headers.render([USER], generation_prompt=True)
    ids = headers.encode(text)
    assert ids.count(tiny_tokenizer.bos_token_id) == 1 and ids[0] == tiny_tokenizer.bos_token_id
    assert headers.decode(ids) == text


@pytest.mark.parametrize("text", ["", "é 你好 🎲", "a\x00b\r\n\tc", " ", "a\ud800b"])
def test_any_text_can_be_encoded(renderer: Any, text: str) -> None:
    chatml = renderer("chatml")
    assert chatml.decode(chatml.encode(text)) == text.replace("\ud800", "?")


def test_tools_unknown_to_the_template_are_described_in_the_system_message(renderer: Any) -> None:
    text = renderer("chatml", tools=[LOOK]).render(
        [Message.of("system", "Play."), USER], generation_prompt=True
    )
    system = text.split("<|im_end|>")[0]
    assert system.startswith("<|im_start|>system\nPlay.\n")
    schema = system.split("<tools>\n")[1].split("\n</tools>")[0]
    assert json.loads(schema) == {"type": "function", "function": LOOK}


def test_tools_known_to_the_template_are_left_to_it(renderer: Any) -> None:
    tools = renderer("tools", tools=[LOOK])
    text = tools.render([USER, Message.of("assistant", "x"), TOOL], generation_prompt=True)
    assert tools.knows_tools and "<tools>" not in text and '"look"' in text
    assert "<|im_start|>tool\nIt is dark.<|im_end|>" in text


def test_tool_results_reach_a_template_without_tools_as_the_user(renderer: Any) -> None:
    text = renderer("strict").render([USER, Message.of("assistant", "x"), TOOL], generation_prompt=True)
    assert text.endswith("[user]<tool_response>\nIt is dark.\n</tool_response>[assistant]")


def test_with_tools_leaves_the_first_renderer_as_it_was(renderer: Any) -> None:
    chatml = renderer("chatml")
    before = chatml.render([USER], generation_prompt=True)
    assert "look" in chatml.with_tools([LOOK]).render([USER], generation_prompt=True)
    assert chatml.render([USER], generation_prompt=True) == before


def test_system_text_reaches_a_template_without_the_role(renderer: Any) -> None:
    strict = renderer("strict")
    assert not strict.knows_system
    text = strict.render([Message.of("system", "Play."), USER], generation_prompt=True)
    assert text == "<|begin_of_text|>[user]Play.\n\nHello.[assistant]"


def test_refused_messages_name_the_roles(renderer: Any) -> None:
    with pytest.raises(TemplateError, match=r"roles \[user, user\]: roles must alternate"):
        renderer("strict").render([USER, USER], generation_prompt=True)


def test_images_for_a_text_template_are_refused(renderer: Any) -> None:
    picture = Message("user", (TextPart("see"), ImagePart(b"png")))
    with pytest.raises(TemplateError, match="doctor template"):
        renderer("chatml").render([picture], generation_prompt=True)


@pytest.fixture
def bare(tiny_tokenizer: Any) -> Any:
    """A tokenizer without a chat template."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = None
    return tokenizer


def test_tokenizer_without_template_gets_chatml(bare: Any) -> None:
    chatml = HuggingFaceRenderer(bare)
    assert not chatml.own_template and chatml.end_of_turn == "<|im_end|>"
    assert chatml.render([USER], generation_prompt=True).endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert "ChatML" in diagnose(chatml).lines()[0]


def test_chatml_ends_turns_with_a_token_that_exists(bare: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bare, "get_vocab", dict)
    bare.eos_token = "<|eot_id|>"
    assert HuggingFaceRenderer(bare).end_of_turn == "<|eot_id|>"
    bare.eos_token = None
    with pytest.raises(UsageError, match="no chat template and no eos token"):
        HuggingFaceRenderer(bare)


def verdicts(renderer: HuggingFaceRenderer) -> dict[str, str]:
    return {case.name: case.verdict for case in diagnose(renderer).cases}


def test_diagnosis_of_a_template_that_keeps_its_prefix(renderer: Any) -> None:
    report = diagnose(renderer("chatml"))
    assert report.keeps_prefix and {case.verdict for case in report.cases} == {"keeps"}
    assert report.lines()[-1] == "prefix: kept; an episode is one segment"
    assert json.loads(json.dumps(report.to_json()))["keeps_prefix"] is True


@pytest.mark.parametrize("name", ["headers", "strip"])
def test_diagnosis_of_a_template_that_trims(renderer: Any, name: str) -> None:
    report = diagnose(renderer(name))
    assert report.keeps_prefix
    assert [case.name for case in report.cases if case.verdict == "trims"] == ["outer white space"]


def test_diagnosis_of_a_template_that_drops_old_thoughts(renderer: Any) -> None:
    report = diagnose(renderer("thinking"))
    found = {case.name: case for case in report.cases}
    assert not report.keeps_prefix
    assert found["plain turn"].verdict == found["outer white space"].verdict == "keeps"
    assert found["thoughts, then the user"].verdict == "forks"
    assert "rewrites the assistant's earlier text" in found["thoughts, then the user"].reason
    assert "thoughts, then the user" in report.lines()[-1]


@pytest.mark.parametrize("name", ["reorder", "count"])
def test_diagnosis_of_a_template_that_rewrites_everything(renderer: Any, name: str) -> None:
    report = diagnose(renderer(name))
    assert {case.verdict for case in report.cases} == {"forks"}
    assert all("rewrites the prompt" in case.reason for case in report.cases)


def test_diagnosis_names_what_a_template_refuses(tiny_tokenizer: Any) -> None:
    once = "{% if messages | length > 1 %}{{ raise_exception('one question only') }}{% endif %}x"
    report = diagnose(HuggingFaceRenderer(tiny_tokenizer, template=once))
    assert {case.verdict for case in report.cases} == {"refuses"}
    assert "one question only" in report.cases[0].reason


def test_diagnosis_sees_a_doubled_and_a_missing_bos(
    renderer: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert diagnose(renderer("headers")).writes_bos
    assert not diagnose(renderer("headers")).doubles_bos
    plain = tiny_tokenizer.encode

    def with_bos(text: str, **options: Any) -> list[int]:
        added = options.get("add_special_tokens", True)
        return [tiny_tokenizer.bos_token_id] * added + plain(text, **{**options, "add_special_tokens": False})

    monkeypatch.setattr(tiny_tokenizer, "encode", with_bos)
    assert diagnose(renderer("headers")).doubles_bos
    report = diagnose(renderer("chatml"))
    assert report.lacks_bos and not report.doubles_bos
    assert any(line.startswith("bos: ") for line in report.lines())


def test_conversation_with_tools_stays_one_segment(renderer: Any) -> None:
    conversation = Conversation(renderer("chatml", tools=[LOOK]), system="Play.")
    call = '<tool_call>{"name": "look", "arguments": {}}</tool_call>'
    ids = tuple(renderer("chatml").encode(call + "<|im_end|>"))
    conversation.observe([USER])
    conversation.complete(Completion(call, ids, (0.0,) * len(ids)))
    conversation.observe([TOOL])
    assert len(conversation.segments) == 1 and not conversation.forks


@pytest.mark.slow
def test_smollm2_keeps_its_prefix_and_ignores_tools() -> None:
    from transformers import AutoTokenizer

    from agentgym.policies import models

    report = diagnose(HuggingFaceRenderer(AutoTokenizer.from_pretrained(models.resolve("smollm2"))))
    assert report.keeps_prefix and not report.knows_tools and report.end_of_turn == "<|im_end|>"
