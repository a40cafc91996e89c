"""Options that several commands share.

Invariant: an option that was not given is ``None`` (or empty), so that what a person typed can be laid over
what a run's config says, and that over the defaults.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import click

from agentgym.config import parse_override
from agentgym.errors import UsageError

F = TypeVar("F", bound=Callable[..., Any])

_STACK = [
    click.option(
        "--env",
        "env_options",
        multiple=True,
        metavar="KEY=VALUE",
        help="The environment's argument; repeatable.",
    ),
    click.option("--parser", metavar="NAME", help="How actions are read: plain, tags, hermes, llama."),
    click.option(
        "--parser-option",
        "parser_options",
        multiple=True,
        metavar="KEY=VALUE",
        callback=lambda context, option, pairs: key_values(pairs) or None,
        help="The parser's option, such as messages=true for hermes; repeatable.",
    ),
    click.option("--history", type=int, help="Earlier turns shown in front of every observation."),
    click.option(
        "--history-observations/--history-actions",
        default=None,
        help="Show earlier observations, or actions alone.",
    ),
    click.option("--list-actions", is_flag=True, default=None, help="Append the admissible actions."),
    click.option("--max-turns", type=int, help="Turns after which an episode is truncated."),
    click.option("--max-observation-chars", type=int, help="Cut observations to this many characters."),
]
_POSITIVE = click.FloatRange(0, min_open=True)
_SERVED = [
    click.option(
        "--split", metavar="NAME", help="Where tasks are drawn from.  [default: the family's first]"
    ),
    click.option(
        "--worker", type=click.Choice(["async", "thread", "process"]), help="Default: the family's."
    ),
    *(
        click.option(
            name,
            type=_POSITIVE,
            default=seconds,
            show_default=True,
            metavar="SECONDS",
            help=f"Deadline of a {of}.",
        )
        for name, seconds, of in (("--step-timeout", 120.0, "step"), ("--reset-timeout", 300.0, "reset"))
    ),
]
STACK_FIELDS = (
    "parser", "parser_options", "history", "history_observations", "list_actions", "max_turns",
    "max_observation_chars",
)  # fmt: skip


def stack_options(function: F) -> F:
    """Add the environment's arguments and wrappers to a command."""
    for option in reversed(_STACK):
        function = option(function)
    return function


def served_options(function: F) -> F:
    """Add what every server of an environment takes: that of :func:`stack_options`, and what sessions may."""
    for option in reversed(_SERVED):
        function = option(function)
    return stack_options(function)


def key_values(pairs: Iterable[str]) -> dict[str, Any]:
    """``KEY=VALUE`` pairs; a value is read as TOML, and as a plain string where that fails.

    Raises:
        ConfigError: A pair has no ``=`` or no key.
        UsageError: A key was given twice.
    """
    values: dict[str, Any] = {}
    for pair in pairs:
        for key, value in parse_override(pair).items():
            if key in values and isinstance(value, dict) and isinstance(values[key], dict):
                values[key] |= value
            elif key in values:
                raise UsageError(f"{key!r} was given twice", hint="give each key once")
            else:
                values[key] = value
    return values


def given(options: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Those of ``options`` called ``names`` that a person typed."""
    return {name: options[name] for name in names if options.get(name) is not None}
