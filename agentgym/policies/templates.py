"""Chat templates: messages to prompt text to token ids, and a diagnosis of what a template does to history.

Invariant: what a template can do is found by rendering with it, never by its model's name; and a prompt's
special tokens come from the template alone (encoding adds none).

Where a template knows no tools, their schemas go into the system message in the Hermes form (``<tools>``,
``<tool_call>``) and their results into user messages; where it knows no system message, that text opens the
first user message.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

from agentgym.conversation import Conversation, extend
from agentgym.errors import TemplateError, UsageError
from agentgym.messages import Message, TextPart
from agentgym.policies.base import Completion

Verdict = Literal["keeps", "trims", "forks", "refuses"]

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + END + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

HERMES_TOOLS = """\
You may call one or more functions. Their JSON Schemas are between <tools> and </tools>:
<tools>
{schemas}
</tools>
To call one, write a JSON object with its name and arguments between <tool_call> and </tool_call>:
<tool_call>
{{"name": "...", "arguments": {{...}}}}
</tool_call>"""

_PROBE = "qzxprobe"
_PROBE_TOOL = {
    "type": "function",
    "function": {
        "name": _PROBE,
        "description": "A probe.",
        "parameters": {"type": "object", "properties": {}, "required": []},
    },
}


class HuggingFaceRenderer:
    """Renders with the chat template of a Hugging Face tokenizer.

    Args:
        tokenizer: A ``PreTrainedTokenizer``; one without a chat template gets ChatML.
        tools: JSON Schemas (``{"type": "function", "function": {...}}``, or the inner object) that every
            prompt describes.
        template: Jinja source that replaces the tokenizer's own template.
    """

    def __init__(
        self, tokenizer: Any, *, tools: Sequence[Mapping[str, Any]] = (), template: str | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.tools = tuple(_as_function(tool) for tool in tools)
        self.own_template = template is None and bool(tokenizer.chat_template)
        self._template = template if template or self.own_template else _chatml(tokenizer)

    def with_tools(self, tools: Sequence[Mapping[str, Any]]) -> HuggingFaceRenderer:
        """The same renderer, describing ``tools``."""
        return HuggingFaceRenderer(self.tokenizer, tools=tools, template=self._template)

    def render(self, messages: Sequence[Message], *, generation_prompt: bool) -> str:
        """See :meth:`agentgym.conversation.Renderer.render`."""
        return self._apply(self._adapt(messages), self.tools, generation_prompt)

    def encode(self, text: str) -> list[int]:
        """See :meth:`agentgym.conversation.Renderer.encode`."""
        text = text.encode("utf-8", "replace").decode()  # a lone surrogate has no bytes, hence no token
        return list(self.tokenizer.encode(text, add_special_tokens=False, verbose=False))

    def decode(self, token_ids: Sequence[int]) -> str:
        """See :meth:`agentgym.conversation.Renderer.decode`."""
        return str(
            self.tokenizer.decode(
                list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )

    @cached_property
    def end_of_turn(self) -> str:
        """The special token after an assistant's text in a rendered history, or ``""`` if there is none."""
        history = [_user("a"), {"role": "assistant", "content": _PROBE}]
        for messages in ([*history, _user("b")], history):
            try:
                text = self._apply(messages, (), False)
            except TemplateError:
                continue
            rest = text.partition(_PROBE)[2].lstrip()
            added = [token.content for token in self.tokenizer.added_tokens_decoder.values()]
            if ends := [token for token in added if rest.startswith(token)]:
                return str(max(ends, key=len))
        return ""

    @cached_property
    def knows_tools(self) -> bool:
        """Whether the template itself describes tools that it is given."""
        try:
            return _PROBE in self._apply([_user("a")], (_PROBE_TOOL,), True)
        except TemplateError:
            return False

    @cached_property
    def knows_system(self) -> bool:
        """Whether the template renders a system message."""
        try:
            return _PROBE in self._apply([{"role": "system", "content": _PROBE}, _user("a")], (), True)
        except TemplateError:
            return False

    def _adapt(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        if not self.knows_tools:
            messages = [_as_user(m) if m.role == "tool" else m for m in messages]
            if self.tools:
                messages = _with_system(messages, describe_tools(self.tools))
        if not self.knows_system and messages and messages[0].role == "system":
            first, *rest = messages
            if not rest or rest[0].role != "user":
                rest = [Message("user", ()), *rest]
            joined = Message("user", (TextPart(first.text + "\n"), *rest[0].content))
            messages = [joined, *rest[1:]]
        return [message.to_template() for message in messages]

    def _apply(
        self, messages: list[dict[str, Any]], tools: Sequence[Mapping[str, Any]], generation_prompt: bool
    ) -> str:
        from jinja2 import TemplateError as JinjaError

        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages,
                    tools=list(tools) or None,
                    chat_template=self._template,
                    add_generation_prompt=generation_prompt,
                    tokenize=False,
                )
            )
        except (JinjaError, TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
            roles = ", ".join(m["role"] for m in messages)
            raise TemplateError(
                f"the chat template of {self.tokenizer.name_or_path or 'this tokenizer'} refuses messages of "
                f"the roles [{roles}]: {error}",
                hint="`agentgym doctor template MODEL` shows what the template accepts",
            ) from error


def describe_tools(tools: Sequence[Mapping[str, Any]]) -> str:
    """The tools' schemas and how to call them, in the Hermes form."""
    return HERMES_TOOLS.format(schemas="\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools))


@dataclass(frozen=True, slots=True)
class Case:
    """What a template did with one kind of turn.

    Attributes:
        name: The kind of turn.
        verdict: ``keeps``: the next prompt continues the tokens of this one. ``trims``: so it does, though
            the template would trim the completion's outer white space; the sampled tokens stand. ``forks``:
            history is rewritten, a new segment opens. ``refuses``: the template raises.
        reason: Why it forked or refused.
    """

    name: str
    verdict: Verdict
    reason: str = ""


@dataclass(frozen=True, slots=True)
class TemplateReport:
    """What a chat template does; see :func:`diagnose`.

    Attributes:
        name: The tokenizer's name or folder.
        own_template: The tokenizer has a chat template; otherwise ChatML stands in.
        end_of_turn: The token that ends an assistant's turn, empty if it is not one token.
        knows_tools: The template describes tools; otherwise the Hermes form is added.
        knows_system: The template renders system messages.
        writes_bos: Rendered prompts start with the beginning-of-sequence token.
        doubles_bos: Encoding a rendered prompt with the tokenizer's defaults would add a second one
            (AgentGym does not).
        lacks_bos: The tokenizer adds the token by default, the template does not write it: prompts go
            without.
        cases: By kind of turn.
    """

    name: str
    own_template: bool
    end_of_turn: str
    knows_tools: bool
    knows_system: bool
    writes_bos: bool
    doubles_bos: bool
    lacks_bos: bool
    cases: tuple[Case, ...]

    @property
    def keeps_prefix(self) -> bool:
        """No kind of turn forks: an episode is one segment."""
        return all(case.verdict in ("keeps", "trims") for case in self.cases)

    def to_json(self) -> dict[str, Any]:
        """All fields, JSON-ready."""
        return {**asdict(self), "keeps_prefix": self.keeps_prefix}

    def lines(self) -> list[str]:
        """The report for a person, a finding a line."""
        forks = [case.name for case in self.cases if case.verdict == "forks"]
        found = [
            f"template: {'its own' if self.own_template else 'none; ChatML stands in'}",
            f"end of turn: {self.end_of_turn or 'not a single token; completions end at the eos token'}",
            "tools: described by the template"
            if self.knows_tools
            else "tools: ignored by the template; AgentGym adds them in the Hermes form",
            "system message: rendered"
            if self.knows_system
            else "system message: not rendered; AgentGym puts it in front of the first user message",
        ]
        if self.doubles_bos:
            found.append("bos: written by the template; the tokenizer's defaults would double it")
        if self.lacks_bos:
            found.append(
                "bos: the tokenizer adds one by default, the template writes none; prompts have none"
            )
        for case in self.cases:
            found.append(f"{case.name}: {case.verdict}" + (f" ({case.reason})" if case.reason else ""))
        found.append(
            "prefix: kept; an episode is one segment"
            if self.keeps_prefix
            else f"prefix: rewritten after {', '.join(forks)}; each opens a new segment"
            if forks
            else "prefix: kept where the template accepts the turn"
        )
        return found


_CALL = '<tool_call>\n{"name": "look", "arguments": {}}\n</tool_call>'
_THOUGHT = "<think>\nThe door is north.\n</think>\n\n"
# name: roles that answer the completions in turn, the completion, whether there is a system message
_CASES: dict[str, tuple[tuple[Literal["user", "tool"], ...], str, bool]] = {
    "plain turn": (("user",), "go north", False),
    "turn under a system message": (("user",), "go north", True),
    "tool result": (("tool",), _CALL, True),
    "thoughts, then the user": (("user",), _THOUGHT + "go north", True),
    "thoughts, then a tool result": (("tool",), _THOUGHT + _CALL, True),
    "thoughts, after several tool results": (("tool", "tool", "user"), _THOUGHT + _CALL, True),
    "outer white space": (("user",), " go north \n", True),
    "empty completion": (("user",), "", True),
    "ten turns": (("user",) * 10, "go north", True),
}


def diagnose(renderer: HuggingFaceRenderer) -> TemplateReport:
    """Try the template on the kinds of turn that agents meet, through :class:`Conversation` itself."""
    tokenizer = renderer.tokenizer
    bos = tokenizer.bos_token_id
    text = renderer.render([Message.of("user", "a")], generation_prompt=True)
    ours = renderer.encode(text)
    default = list(tokenizer.encode(text))
    writes_bos = bos is not None and ours[:1] == [bos]
    adds_bos = bos is not None and len(default) > len(ours) and default[:1] == [bos]
    return TemplateReport(
        name=str(tokenizer.name_or_path),
        own_template=renderer.own_template,
        end_of_turn=renderer.end_of_turn,
        knows_tools=renderer.knows_tools,
        knows_system=renderer.knows_system,
        writes_bos=writes_bos,
        doubles_bos=writes_bos and adds_bos,
        lacks_bos=adds_bos and not writes_bos,
        cases=tuple(_try(renderer, name, *case) for name, case in _CASES.items()),
    )


def _try(
    renderer: HuggingFaceRenderer,
    name: str,
    answers: Sequence[Literal["user", "tool"]],
    text: str,
    system: bool,
) -> Case:
    conversation = Conversation(renderer, system="You play a game." if system else "")
    sampled = tuple(renderer.encode(text + renderer.end_of_turn))
    completion = Completion(text, sampled, (0.0,) * len(sampled))
    history = [Message.of("system", "You play a game.")] if system else []
    trims = False
    try:
        new = Message.of("user", "You are in a hall.")
        for role in answers:
            conversation.observe([new])
            conversation.complete(completion)
            history.append(new)
            new = Message.of(role, "You see a door.")
            trims = trims or _trims(renderer, history, text, new)
            history.append(Message.of("assistant", text))
        conversation.observe([new])
    except TemplateError as error:
        return Case(name, "refuses", error.message.splitlines()[0])
    if conversation.forks:
        turn, reason = conversation.forks[0]
        return Case(name, "forks", f"at turn {turn + 1}: {reason}")
    return Case(name, "trims" if trims else "keeps")


def _trims(renderer: HuggingFaceRenderer, before: Sequence[Message], text: str, new: Message) -> bool:
    if extend(renderer, before, text, [new], sampled_end=True).text is None:
        return False
    prompt = renderer.render(before, generation_prompt=True)
    full = renderer.render([*before, Message.of("assistant", text), new], generation_prompt=True)
    return not full.startswith(prompt + text + renderer.end_of_turn)


def _chatml(tokenizer: Any) -> str:
    """ChatML whose turns end in a token that the tokenizer has."""
    end = "<|im_end|>"
    if end not in tokenizer.get_vocab():
        end = tokenizer.eos_token
    if not end:
        raise UsageError(
            f"the tokenizer {tokenizer.name_or_path!r} has no chat template and no eos token",
            hint="use an instruction-tuned model, or pass template= and set the tokenizer's eos token",
        )
    return CHATML.replace("END", json.dumps(end))


def _as_function(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    return tool if "function" in tool else {"type": "function", "function": dict(tool)}


def _as_user(message: Message) -> Message:
    return Message("user", (TextPart("<tool_response>"), *message.content, TextPart("</tool_response>")))


def _with_system(messages: Sequence[Message], text: str) -> list[Message]:
    if messages and messages[0].role == "system":
        head = Message("system", (*messages[0].content, TextPart("\n" + text)))
        return [head, *messages[1:]]
    return [Message.of("system", text), *messages]


def _user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}
