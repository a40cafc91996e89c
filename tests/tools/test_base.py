from __future__ import annotations

import asyncio
import dataclasses
import enum
import functools
import json
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, Field

from agentgym.errors import ToolFailed, UsageError
from agentgym.messages import ToolCall
from agentgym.tools import Tool, Toolbox, ToolError, ToolResult, tool, tool_from_schema
from agentgym.tools.base import MAX_CHARS, as_text


class Place(BaseModel):
    """Where it is."""

    city: str
    title: str = "home"


@dataclasses.dataclass
class Point:
    x: float
    y: float = 0.0


class Unit(enum.Enum):
    CELSIUS = "C"
    KELVIN = "K"


@tool
def forecast(
    place: Place,
    days: int = 3,
    unit: Literal["C", "F"] = "C",
    tags: list[str] | None = None,
    point: Point | None = None,
) -> dict[str, Any]:
    """Tell the weather.

    It is made up.

    Args:
        place: Where.
        days: How many days.
        tags: Words,
            over two lines.
    """
    return {"city": place.city, "days": days, "unit": unit, "tags": tags, "x": point.x if point else None}


def parameters(made: Tool) -> dict[str, Any]:
    return made.schema["function"]["parameters"]


class TestSchema:
    def test_of_a_typed_function(self) -> None:
        assert forecast.name == "forecast"
        assert forecast.description == "Tell the weather.\n\nIt is made up."
        schema = parameters(forecast)
        assert schema["type"] == "object" and schema["additionalProperties"] is False
        assert schema["required"] == ["place"]
        told = schema["properties"]
        assert told["days"] == {"type": "integer", "default": 3, "description": "How many days."}
        assert told["unit"] == {"enum": ["C", "F"], "type": "string", "default": "C"}
        assert told["tags"]["description"] == "Words,\nover two lines."
        assert told["tags"]["anyOf"] == [{"type": "array", "items": {"type": "string"}}, {"type": "null"}]
        # A property called title stays; the titles that pydantic adds go.
        place = schema["$defs"]["Place"]
        assert set(place["properties"]) == {"city", "title"} and "title" not in place
        json.dumps(forecast.schema)

    @pytest.mark.parametrize(
        "doc",
        [
            "Look.\n\nArgs:\n    at: The thing.",
            "Look.\n\nParameters\n----------\nat : str\n    The thing.\n",
            "Look.\n\n:param at: The thing.\n:type at: str",
        ],
        ids=["google", "numpy", "rest"],
    )
    def test_docstring_styles(self, doc: str) -> None:
        def look(at: str) -> str:
            return at

        look.__doc__ = doc
        made = tool(look)
        assert made.description == "Look."
        assert parameters(made)["properties"] == {"at": {"type": "string", "description": "The thing."}}

    def test_annotated_fields_and_their_words_stay(self) -> None:
        @tool
        def roll(sides: Annotated[int, Field(ge=2, le=20, description="Of the die.")] = 6) -> int:
            """Roll."""
            return sides

        told = parameters(roll)["properties"]["sides"]
        assert told == {
            "type": "integer",
            "minimum": 2,
            "maximum": 20,
            "default": 6,
            "description": "Of the die.",
        }
        assert "greater than or equal to 2" in roll.call({"sides": 1}).content

    def test_defaults(self) -> None:
        @tool
        def keep(
            words: list[str] = [],  # noqa: B006
            unit: Unit = Unit.CELSIUS,
            where: dict[str, Any] = {"title": "x"},  # noqa: B006
            odd: Any = object,
        ) -> list[str]:
            """Keep."""
            assert odd is object
            words.append(unit.value)
            return words

        told = parameters(keep)["properties"]
        assert told["words"]["default"] == [] and told["unit"]["default"] == "C"
        assert told["where"]["default"] == {"title": "x"}
        assert "default" not in told["odd"]
        assert [keep.call({}).value for _ in range(2)] == [["C"], ["C"]]
        assert keep.call({"unit": "K"}).content == '["K"]'

    def test_names_that_pydantic_keeps_for_itself(self) -> None:
        @tool
        def odd(schema: str, copy: bool, json: int, model_config: float, self_: str = "") -> str:
            """Odd."""
            return f"{schema} {copy} {json} {model_config}"

        result = odd.call({"schema": "s", "copy": True, "json": 1, "model_config": 0.5})
        assert result.content == "s True 1 0.5"

    def test_methods_callables_and_no_arguments(self) -> None:
        class Door:
            """A door."""

            def __init__(self) -> None:
                self.open = False

            def push(self) -> str:
                """Push it."""
                self.open = not self.open
                return "open" if self.open else "shut"

            def __call__(self, hard: bool = False) -> str:
                """Kick it."""
                return f"kicked {hard}"

        door = Door()
        push, kick = tool(door.push), tool(name="kick")(door)
        assert parameters(push) == {"type": "object", "properties": {}, "additionalProperties": False}
        assert [push.call({}).content for _ in range(2)] == ["open", "shut"]
        assert kick.description == "Kick it." and kick.call({"hard": True}).content == "kicked True"

    def test_other_name_and_description(self) -> None:
        made = tool(name="weather", description="Short.")(lambda: "sun")
        assert (made.name, made.description, made.call({}).content) == ("weather", "Short.", "sun")

    def test_a_schema_that_was_given_away_can_be_changed(self) -> None:
        parameters(forecast)["properties"].clear()
        assert "days" in parameters(forecast)["properties"]


def undocumented(a: int) -> int:
    return a


def untyped(a) -> None:  # type: ignore[no-untyped-def]
    """Do."""


def variable(*a: int) -> None:
    """Do."""


def positional(a: int, /) -> None:
    """Do."""


def no_json(a: type[Unit], b: functools.partial) -> None:  # type: ignore[type-arg]
    """Do."""


def unknown_type(a: Nowhere) -> None:  # type: ignore[name-defined]  # noqa: F821
    """Do."""


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (undocumented, "no docstring"),
        (untyped, "'a' of the tool 'untyped' has no type"),
        (variable, r"takes \*a"),
        (positional, "takes a: "),
        (no_json, "without a JSON Schema"),
        (unknown_type, "Nowhere"),
        (lambda: 1, "'<lambda>' is no name"),
    ],
)
def test_functions_that_make_no_tool(function: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        tool(function)
    assert caught.value.hint


class TestCalls:
    def test_a_call(self) -> None:
        result = forecast.call({"place": {"city": "Oslo"}, "unit": "F", "tags": ["a"], "point": {"x": 2}})
        assert result.ok and result.value["x"] == 2.0
        assert result.content == '{"city": "Oslo", "days": 3, "unit": "F", "tags": ["a"], "x": 2.0}'

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ({}, "place: Field required"),
            ({"place": {"city": "Oslo"}, "day": 1}, "day: Extra inputs are not permitted"),
            ({"place": {}}, "place.city: Field required"),
            ({"place": {"city": "Oslo"}, "unit": "X"}, "unit: Input should be 'C' or 'F'"),
            ({"place": {"city": "Oslo"}, "tags": [1]}, "tags.0: Input should be a valid string"),
            ({"argument_place": {"city": "Oslo"}}, "argument_place: Extra"),
            (dict.fromkeys(map(str, range(100)), 0), "and 96 more"),
        ],
    )
    def test_what_does_not_fit_is_told(self, arguments: dict[str, Any], words: str) -> None:
        result = forecast.call(arguments)
        assert not result.ok and result.value is None
        assert result.content.startswith("Error: forecast: ") and words in result.content
        assert "\n" not in result.content and len(result.content) < 1_000

    @pytest.mark.parametrize(
        ("error", "content"),
        [
            (ToolError("no such book"), "Error: no such book"),
            (ToolError(), "Error: fail failed"),
            (KeyError("x"), "Error: fail failed: KeyError: 'x'"),
            (SystemExit(3), "Error: fail failed: SystemExit: 3"),
            (RecursionError("deep"), "Error: fail failed: RecursionError: deep"),
            (ValueError("\ud83d"), "Error: fail failed: ValueError: ?"),
        ],
    )
    def test_errors_of_the_tool_are_text(self, error: BaseException, content: str) -> None:
        @tool
        def fail() -> None:
            """Fail."""
            raise error

        result = fail.call({})
        assert (result.content, result.ok) == (content, False)

    def test_an_error_whose_message_fails_is_text_too(self) -> None:
        class Mute(Exception):
            def __str__(self) -> str:
                raise RuntimeError

        @tool
        def fail() -> None:
            """Fail."""
            raise Mute

        assert fail.call({}).content == "Error: fail failed: Mute: its message cannot be read"

    def test_broken_machinery_and_interrupts_are_raised(self) -> None:
        for error in (ToolFailed("the index is gone"), KeyboardInterrupt()):

            def fail(error: Any = error) -> None:
                """Fail."""
                raise error

            with pytest.raises(type(error)):
                tool(fail).call({})


class TestSchemas:
    nested: dict[str, Any] = {  # noqa: RUF012
        "type": "object",
        "properties": {
            "items": {"type": "array", "items": {"$ref": "#/$defs/item"}},
            "kind": {"type": "string", "enum": ["a", "b"]},
        },
        "required": ["items"],
        "$defs": {"item": {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}},
    }

    def made(self) -> Tool:
        return tool_from_schema("add", "Add.", self.nested, lambda items, kind="a": [kind, items])

    def test_a_call(self) -> None:
        assert self.made().call({"items": [{"n": 1}]}).value == ["a", [{"n": 1}]]
        assert self.made().schema["function"]["parameters"] == self.nested

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ({}, "'items' is a required property"),
            ({"items": [{"n": 1}, {"n": "x"}]}, "items.1.n: 'x' is not of type 'integer'"),
            ({"items": [], "kind": "c"}, "kind: 'c' is not one of ['a', 'b']"),
            ({"items": [], "more": 1}, "'more' was unexpected"),
            ({"items": "x" * 100_000}, "more characters]"),
            ({"items": [0] * 100}, "and 95 more"),
        ],
    )
    def test_what_does_not_fit_is_told(self, arguments: dict[str, Any], words: str) -> None:
        result = self.made().call(arguments)
        assert not result.ok and words in result.content and len(result.content) < 2_000

    def test_a_tool_may_keep_what_it_is_given(self) -> None:
        given = {"items": [{"n": 1}]}
        self.made().call(given).value[1][0]["n"] = 2
        assert given == {"items": [{"n": 1}]}

    def test_unknown_arguments_where_the_schema_allows_them(self) -> None:
        made = tool_from_schema("any", "Any.", {"additionalProperties": True}, lambda **given: given)
        assert made.call({"a": [1]}).value == {"a": [1]}

    @pytest.mark.parametrize(
        "schema",
        [{"type": "array"}, {"properties": {"a": {"type": "dict"}}}, {"required": 1}, {"pattern": "("}],
    )
    def test_what_is_no_schema_of_an_object(self, schema: dict[str, Any]) -> None:
        with pytest.raises(UsageError, match="schema of the tool 'bad'"):
            tool_from_schema("bad", "Bad.", schema, dict)

    @pytest.mark.parametrize("part", [{"$ref": "#/$defs/none"}, {"items": {"$ref": "#/none"}}])
    def test_a_schema_that_cannot_be_used_is_the_tools_failure(self, part: dict[str, Any]) -> None:
        made = tool_from_schema("bad", "Bad.", {"properties": {"a": part}}, dict)
        with pytest.raises(ToolFailed, match="the schema of the tool 'bad'"):
            made.call({"a": ["x"]})

    def test_nothing_is_fetched(self) -> None:
        with pytest.raises(UsageError, match="outside itself"):
            tool_from_schema("far", "Far.", {"properties": {"a": {"$ref": "https://example.invalid"}}}, dict)


class TestToolbox:
    box = Toolbox([forecast, tool(name="open", description="Open.")(lambda: "opened")])

    def test_holds_tools_in_order(self) -> None:
        assert [t.name for t in self.box] == ["forecast", "open"] and len(self.box) == 2
        assert "open" in self.box and "shut" not in self.box
        assert [s["function"]["name"] for s in self.box.schemas] == ["forecast", "open"]

    def test_calls_by_name(self) -> None:
        assert self.box.call(ToolCall("open", {})).content == "opened"

    @pytest.mark.parametrize(
        ("name", "words"),
        [
            ("forcast", "try forecast."),
            ("xyz", "try forecast, open."),
            ("x" * 100_000, "more characters]"),
            ("\ud83d", "'?'"),
            ("", "''"),
        ],
    )
    def test_an_unknown_name_is_answered(self, name: str, words: str) -> None:
        result = self.box.call(ToolCall(name, {}))
        assert not result.ok and words in result.content and len(result.content) < 500
        result.content.encode()

    def test_an_empty_box_says_so(self) -> None:
        assert "there are no tools now" in Toolbox([]).call(ToolCall("x", {})).content

    def test_two_of_one_name(self) -> None:
        with pytest.raises(UsageError, match="two tools are called 'forecast'"):
            Toolbox([forecast, forecast])


class Plain:
    pass


class Mute:
    def __repr__(self) -> str:
        raise RuntimeError


CYCLE: list[Any] = []
CYCLE.append(CYCLE)

TEXTS: dict[str, tuple[Any, str]] = {
    "text": ("as it is\n", "as it is\n"),
    "nothing": (None, "null"),
    "json": ({"é": [1, True, 0.5]}, '{"é": [1, true, 0.5]}'),
    "a set": ({"a", "c", "b"}, '["a", "b", "c"]'),
    "a model": (Place(city="Oslo"), '{"city": "Oslo", "title": "home"}'),
    "a dataclass": (Point(1.0), '{"x": 1.0, "y": 0.0}'),
    "an object": ([Plain()], '["<Plain>"]'),
    "bytes": (b"\xff", "\"b'\\\\xff'\""),
    "keys": ({(1, 2): 3}, "{(1, 2): 3}"),
    "a cycle": (CYCLE, "[[...]]"),
    "no number": (float("nan"), "NaN"),
    "a surrogate": ("a \ud83d b", "a ? b"),
    "an inner surrogate": (["\ud83d"], '["?"]'),
    "no words": ({(1,): Mute()}, "<dict>"),
    "digits": (10**5_000, "<int>"),
}


@pytest.mark.parametrize("case", TEXTS)
def test_any_value_has_a_text(case: str) -> None:
    value, text = TEXTS[case]
    assert as_text(value) == text


def test_a_long_text_is_cut() -> None:
    assert as_text("x" * (MAX_CHARS + 7)) == "x" * MAX_CHARS + "… [7 more characters]"
    assert as_text([1] * 100_000).endswith("more characters]")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
likely = st.sampled_from(["place", "days", "unit", "tags", "point", "items", "kind", "n"])


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(likely | st.text(max_size=6), json_values, max_size=5), st.text(max_size=20))
def test_no_arguments_and_no_name_raise(arguments: dict[str, Any], name: str) -> None:
    box = Toolbox([forecast, TestSchemas().made()])
    for called in ("forecast", "add", name):
        result = box.call(ToolCall(called, arguments))
        result.content.encode()
        assert result.ok or result.content.startswith("Error: ")


class Waiter:
    """Waits."""

    async def __call__(self, seconds: float) -> str:
        """Wait a little."""
        await asyncio.sleep(seconds)
        return "waited"


class TestCoroutines:
    @pytest.fixture
    def box(self) -> Toolbox:
        async def double(n: int) -> int:
            """Double a number."""
            await asyncio.sleep(0)
            return 2 * n

        async def fail(how: str) -> None:
            """Fail."""
            await asyncio.sleep(0)
            if how == "cancelled":
                raise asyncio.CancelledError
            raise {"told": ToolError, "value": ValueError, "broken": ToolFailed, "exit": SystemExit}[how](how)

        schema = {"properties": {"n": {"type": "integer"}}}
        given = tool_from_schema("given", "Given.", schema, double)
        return Toolbox([tool(double), tool(fail), tool(name="wait")(Waiter()), given, forecast])

    def call(self, box: Toolbox, name: str, **arguments: Any) -> ToolResult:
        return asyncio.run(box.acall(ToolCall(name, arguments)))

    def test_they_are_tools(self, box: Toolbox) -> None:
        assert [made.is_async for made in box] == [True, True, True, True, False]
        assert self.call(box, "double", n=2) == ToolResult("4", value=4)
        assert self.call(box, "given", n=3).value == 6
        assert self.call(box, "wait", seconds=0).content == "waited"

    def test_a_plain_tool_answers_as_ever(self, box: Toolbox) -> None:
        calls = [
            ToolCall("forecast", {"place": {"city": "Oslo"}}),
            ToolCall("forecast", {}),
            ToolCall("x", {}),
        ]
        for call in calls:
            assert asyncio.run(box.acall(call)) == box.call(call)

    def test_what_is_wrong_comes_back_as_text(self, box: Toolbox) -> None:
        assert self.call(box, "double", n="x").content.startswith("Error: double: n: ")
        assert self.call(box, "fail", how="told") == ToolResult("Error: told", ok=False)
        assert self.call(box, "fail", how="value").content == "Error: fail failed: ValueError: value"
        assert self.call(box, "fail", how="exit").content == "Error: fail failed: SystemExit: exit"

    def test_what_is_broken_or_cancelled_is_raised(self, box: Toolbox) -> None:
        with pytest.raises(ToolFailed):
            self.call(box, "fail", how="broken")
        with pytest.raises(asyncio.CancelledError):
            self.call(box, "fail", how="cancelled")

    @pytest.mark.parametrize("name", ["double", "wait", "given"])
    def test_the_plain_call_refuses_them(self, box: Toolbox, name: str) -> None:
        with pytest.raises(UsageError, match=f"the tool '{name}' is a coroutine function") as caught:
            box.call(ToolCall(name, {"n": 1}))
        assert "acall()" in caught.value.hint
