"""Tools: a typed Python function that a policy may call, described to it by a JSON Schema.

Invariant: what a policy passes is checked before the function runs, and whatever is wrong with it (no such
tool, arguments that do not fit, an error of the tool) comes back as text for the policy; only a failure of
infrastructure is raised.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_type_hints, overload

import docstring_parser
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model
from pydantic.errors import PydanticUserError
from pydantic.json_schema import GenerateJsonSchema

from agentgym.errors import InfrastructureError, MissingDependency, ToolFailed, UsageError, nearest
from agentgym.messages import ToolCall

MAX_CHARS = 20_000
"""Longest result shown to a policy where a tool does not say otherwise, in characters."""

MAX_PROBLEMS = 5
"""How many things wrong with the arguments of one call are told."""

_SHOWN = 300
"""Longest single problem, in characters: a problem may quote what the policy wrote."""

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
"""What chat templates and endpoints take for the name of a tool."""


class ToolError(Exception):
    """What a tool raises to tell the policy that the call failed: its message is the observation."""


@dataclass(frozen=True, slots=True)
class ToolResult:
    """What a call gave.

    Attributes:
        content: For the policy.
        ok: Whether the call did what it was asked to.
        value: What the function returned, before it became text; ``None`` where the call failed.
    """

    content: str
    ok: bool = True
    value: Any = None


@dataclass(frozen=True, slots=True)
class Tool:
    """One tool.

    Attributes:
        name: What a policy calls it.
        description: What it does, for the policy.
        parameters: JSON Schema of the arguments, of type ``object``.
        function: Called with the arguments by name; it may be a coroutine function.
        check: Reads arguments as the function takes them, or raises ``ValueError`` with what is wrong.
        limit: Longest result shown to a policy, in characters.
    """

    name: str
    description: str
    parameters: Mapping[str, Any]
    function: Callable[..., Any]
    check: Callable[[Mapping[str, Any]], Mapping[str, Any]]
    limit: int = MAX_CHARS

    @property
    def schema(self) -> dict[str, Any]:
        """The tool as chat templates and ``info["tools"]`` take it."""
        parameters = json.loads(json.dumps(self.parameters))  # a copy of their own for whoever asks
        inner = {"name": self.name, "description": self.description, "parameters": parameters}
        return {"type": "function", "function": inner}

    @property
    def is_async(self) -> bool:
        """Whether the function is a coroutine function, so that only :meth:`acall` can run it."""
        function = self.function
        return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(_body(function))

    def call(self, arguments: Mapping[str, Any]) -> ToolResult:
        """Check ``arguments`` and run the function.

        Raises:
            InfrastructureError: The tool's own machinery broke.
            UsageError: The function is a coroutine function.
        """
        if self.is_async:
            raise UsageError(
                f"the tool {self.name!r} is a coroutine function", hint="await acall() in place of call()"
            )
        try:
            checked = self.check(arguments)
        except ValueError as error:
            return _failed(f"{self.name}: {_told(error)}")
        try:
            value = self.function(**checked)
        except InfrastructureError:
            raise
        except (Exception, SystemExit) as error:
            return self._raised(error)
        return ToolResult(as_text(value, self.limit), value=value)

    async def acall(self, arguments: Mapping[str, Any]) -> ToolResult:
        """:meth:`call` for either kind of function; a plain one runs on the event loop.

        Raises:
            InfrastructureError: The tool's own machinery broke.
        """
        if not self.is_async:
            return self.call(arguments)
        try:
            checked = self.check(arguments)
        except ValueError as error:
            return _failed(f"{self.name}: {_told(error)}")
        try:
            value = await self.function(**checked)
        except InfrastructureError:
            raise
        except (Exception, SystemExit) as error:
            return self._raised(error)
        return ToolResult(as_text(value, self.limit), value=value)

    def _raised(self, error: BaseException) -> ToolResult:
        if isinstance(error, ToolError):
            return _failed(_told(error) or f"{self.name} failed")
        return _failed(f"{self.name} failed: {type(error).__name__}: {_told(error)}")


@overload
def tool(function: Callable[..., Any], /) -> Tool: ...
@overload
def tool(
    *, name: str | None = None, description: str | None = None
) -> Callable[[Callable[..., Any]], Tool]: ...
def tool(
    function: Callable[..., Any] | None = None, /, *, name: str | None = None, description: str | None = None
) -> Any:
    """Make a :class:`Tool` of a typed function or coroutine function with a docstring (Google, NumPy, reST).

    The schema comes from the annotations and the defaults, the descriptions from the docstring. A bound
    method is a function too: ``tool(self.search)``.

    Args:
        function: The function; left out where the decorator takes options.
        name: Another name than the function's.
        description: Another description than the docstring's.

    Raises:
        UsageError: A parameter has no annotation, is positional-only or variable, or there is no description.
    """
    if function is None:
        return lambda given: tool_of(given, name=name, description=description)
    return tool_of(function, name=name, description=description)


def tool_of(function: Callable[..., Any], *, name: str | None, description: str | None) -> Tool:
    """See :func:`tool`."""
    called = _checked_name(name or str(getattr(function, "__name__", type(function).__name__)))
    body = _body(function)
    parsed = docstring_parser.parse(inspect.getdoc(body) or "")
    description = description or parsed.description
    description = description.strip() if description else None
    if not description:
        raise UsageError(f"the tool {called!r} has no docstring", hint="say in one what it does")
    told = {parameter.arg_name: parameter.description for parameter in parsed.params}
    try:
        hints = get_type_hints(body, include_extras=True)
    except (NameError, TypeError) as error:
        raise UsageError(
            f"the types of the tool {called!r} cannot be read: {error}",
            hint="import what its annotations name where the function is defined",
        ) from error
    fields: dict[str, Any] = {}
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise UsageError(
                f"the tool {called!r} takes {parameter}", hint="give every argument a name of its own"
            )
        if parameter.name not in hints:
            raise UsageError(f"{parameter.name!r} of the tool {called!r} has no type", hint="annotate it")
        default = ... if parameter.default is parameter.empty else parameter.default
        described: dict[str, Any] = {"description": text} if (text := told.get(parameter.name)) else {}
        field = Field(default, alias=parameter.name, **described)
        # Names are prefixed inside: pydantic keeps some (schema, copy, json) for itself.
        fields[f"argument_{parameter.name}"] = (hints[parameter.name], field)
    try:
        model = create_model(f"{called}_arguments", __config__=ConfigDict(extra="forbid"), **fields)
        schema = _plain(model.model_json_schema(schema_generator=_SchemaOfArguments))
    except PydanticUserError as error:
        raise UsageError(
            f"an argument of the tool {called!r} has a type without a JSON Schema: {error.message}",
            hint="use JSON's types, lists and dicts of them, Literal, dataclasses or pydantic models",
        ) from error

    def check(arguments: Mapping[str, Any]) -> Mapping[str, Any]:
        try:
            read = model.model_validate(dict(arguments))
        except ValidationError as error:
            raise ValueError(_problems(error)) from None
        return {field.removeprefix("argument_"): getattr(read, field) for field in fields}

    return Tool(called, description, {"properties": {}, **schema}, function, check)


class _SchemaOfArguments(GenerateJsonSchema):
    # A default that JSON cannot say is left out of the schema; the function still has it.
    ignored_warning_kinds = {"skipped-choice", "non-serializable-default"}  # noqa: RUF012


def tool_from_schema(
    name: str, description: str, parameters: Mapping[str, Any], function: Callable[..., Any]
) -> Tool:
    """A :class:`Tool` whose schema is given, not derived.

    Args:
        name: What a policy calls it.
        description: For the policy.
        parameters: JSON Schema of the arguments, of type ``object``. Unknown arguments are refused unless it
            says ``additionalProperties``. Only references into itself (``#...``) are followed.
        function: Called with a copy of the arguments, by name; it may be a coroutine function.

    Raises:
        MissingDependency: jsonschema is not installed.
        UsageError: ``parameters`` is no JSON Schema of an object, or the name is none.
    """
    try:
        import jsonschema
    except ImportError as error:
        raise MissingDependency("jsonschema", "apis") from error

    schema = {"type": "object", "properties": {}, **copy.deepcopy(dict(parameters))}
    if schema["type"] != "object":
        raise UsageError(f"the schema of the tool {name!r} is of type {schema['type']!r}, not 'object'")
    try:
        jsonschema.Draft202012Validator.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise UsageError(f"the schema of the tool {name!r} is none: {error.message[:_SHOWN]}") from error
    for reference in _references(schema):
        if not reference.startswith("#"):
            # jsonschema would fetch it, in the midst of an episode.
            raise UsageError(
                f"the schema of the tool {name!r} refers to {reference[:_SHOWN]}, outside itself"
            )
    validator = jsonschema.Draft202012Validator({"additionalProperties": False, **schema})

    def check(arguments: Mapping[str, Any]) -> Mapping[str, Any]:
        # A copy: a tool may keep or change what it is given.
        given = copy.deepcopy(dict(arguments))
        try:
            problems = sorted(validator.iter_errors(given), key=lambda error: list(map(str, error.path)))
        except Exception as error:  # a reference that leads nowhere: no doing of the policy
            raise ToolFailed(
                f"the schema of the tool {name!r} cannot be used: {_told(error)}", hint="mend the schema"
            ) from error
        if problems:
            raise ValueError(_listed((".".join(map(str, e.absolute_path)), e.message) for e in problems))
        return given

    return Tool(_checked_name(name), description, schema, function, check)


class Toolbox:
    """The tools of an episode, by name.

    Args:
        tools: The tools, in the order in which they are described.

    Raises:
        UsageError: Two have one name.
    """

    def __init__(self, tools: Iterable[Tool]) -> None:
        self._tools: dict[str, Tool] = {}
        for made in tools:
            if made.name in self._tools:
                raise UsageError(f"two tools are called {made.name!r}", hint="tool(name=…) renames one")
            self._tools[made.name] = made

    def __iter__(self) -> Iterator[Tool]:
        return iter(self._tools.values())

    def __contains__(self, name: object) -> bool:
        return name in self._tools

    def __len__(self) -> int:
        return len(self._tools)

    @property
    def schemas(self) -> list[dict[str, Any]]:
        """For ``info["tools"]``."""
        return [made.schema for made in self]

    def call(self, call: ToolCall) -> ToolResult:
        """Run one call.

        Raises:
            InfrastructureError: The tool's own machinery broke.
            UsageError: The tool's function is a coroutine function.
        """
        made = self._find(call)
        return made if isinstance(made, ToolResult) else made.call(call.arguments)

    async def acall(self, call: ToolCall) -> ToolResult:
        """:meth:`call` for tools of either kind.

        Raises:
            InfrastructureError: The tool's own machinery broke.
        """
        made = self._find(call)
        return made if isinstance(made, ToolResult) else await made.acall(call.arguments)

    def _find(self, call: ToolCall) -> Tool | ToolResult:
        made = self._tools.get(call.name)
        if made is None:
            near = nearest(call.name[:100], self._tools) or list(self._tools)
            ways = f"try {', '.join(near)}" if near else "there are no tools now"
            return _failed(f"there is no tool {_cut(call.name, 80)!r}; {ways}.")
        return made


def as_text(value: Any, limit: int = MAX_CHARS) -> str:
    """A tool's result as a policy reads it: text as it is, anything else as JSON; cut at ``limit``.

    Any value has a text: what JSON cannot say is written as Python says it, sets in sorted order, objects
    that have no words of their own by their type (an address would differ from run to run). Halves of
    surrogate pairs, which no file can hold, become question marks.
    """
    if isinstance(value, str):
        return _cut(value, limit)
    try:
        text = json.dumps(value, ensure_ascii=False, default=_jsonable)
    except (TypeError, ValueError, RecursionError):  # keys that are no strings, cycles, thousands of digits
        try:
            text = str(value)
        except Exception:
            text = _nameless(value)
    return _cut(text, limit)


def _body(function: Callable[..., Any]) -> Any:
    # An object with __call__ has its types and its words there, and is a coroutine function by it.
    return function if inspect.isroutine(function) else type(function).__call__


def _references(schema: Any) -> Iterator[str]:
    if isinstance(schema, dict):
        for key, value in schema.items():
            if key in ("$ref", "$dynamicRef") and isinstance(value, str):
                yield value
            yield from _references(value)
    elif isinstance(schema, list):
        for item in schema:
            yield from _references(item)


def _jsonable(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, set | frozenset):
        return sorted(value, key=repr)
    kind: Any = type(value)
    if kind.__str__ is object.__str__ and kind.__repr__ is object.__repr__:
        return _nameless(value)
    return str(value)


def _nameless(value: Any) -> str:
    return f"<{type(value).__name__}>"


def _cut(text: str, limit: int) -> str:
    if len(text) > limit:
        text = f"{text[:limit]}… [{len(text) - limit} more characters]"
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def _failed(problem: str) -> ToolResult:
    return ToolResult(as_text(f"Error: {problem}"), ok=False)


def _told(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:
        return "its message cannot be read"


def _checked_name(name: str) -> str:
    if _NAME.fullmatch(name) is None:
        raise UsageError(
            f"{name[:80]!r} is no name for a tool",
            hint="use up to 64 letters, digits, '_', '-' and '.': tool(name=…) gives another one",
        )
    return name


def _listed(problems: Iterable[tuple[str, str]]) -> str:
    """What is wrong, place by place, as one line."""
    told = [_cut(f"{place}: {problem}" if place else problem, _SHOWN) for place, problem in problems]
    more = [f"and {len(told) - MAX_PROBLEMS} more"] if len(told) > MAX_PROBLEMS else []
    return "; ".join(told[:MAX_PROBLEMS] + more)


def _problems(error: ValidationError) -> str:
    found = error.errors(include_url=False, include_context=False, include_input=False)
    return _listed((".".join(str(part) for part in problem["loc"]), problem["msg"]) for problem in found)


def _plain(schema: Any) -> Any:
    """A schema without the titles that pydantic adds to everything."""
    if isinstance(schema, dict):
        return {key: _plain_part(key, value) for key, value in schema.items() if key != "title"}
    return [_plain(item) for item in schema] if isinstance(schema, list) else schema


def _plain_part(key: str, value: Any) -> Any:
    if key in ("default", "const", "enum", "examples"):
        return value  # a value, no schema
    if key in ("properties", "$defs"):
        return {name: _plain(inner) for name, inner in value.items()}
    return _plain(value)
