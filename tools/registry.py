"""Tools by name: the built-in ones, those of plug-ins, and import paths.

Invariant: naming a tool imports that tool alone, and an unknown name or option is refused with the near ones.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from agentgym import plugins
from agentgym.errors import UnknownName, UsageError
from agentgym.tools.base import Tool

BUILTIN: dict[str, str] = {
    "bash": "agentgym.tools.bash:bash_tool",
    "calculator": "agentgym.tools.calculator:calculator_tool",
    "edit": "agentgym.tools.edit:edit_tool",
    "open": "agentgym.tools.search:search_tools",
    "python": "agentgym.tools.python:python_tool",
    "search": "agentgym.tools.search:search_tools",
    "sql": "agentgym.tools.sql:sql_tool",
    "submit": "agentgym.tools.submit:submit_tool",
}
"""Import paths by name. What lies there is a :class:`Tool`, or makes one or several of its options."""


def make_tool(name: str, **options: Any) -> Tool:
    """The tool called ``name``.

    Args:
        name: One of :data:`BUILTIN`, a name that an installed package declares in the entry-point group
            ``agentgym.tools``, or an import path ``package.module:name``. What it stands for is a
            :class:`Tool` (``@tool``), or a function that makes one; of several made together, such as
            ``search`` and ``open`` over one corpus, the one of that name is taken.
        **options: Arguments of the function that makes it.

    Raises:
        UnknownName: No such tool or option; the near ones are listed.
        UsageError: What the name stands for is no tool and makes none.
    """
    found = plugins.find("tools", name, BUILTIN, "tool")
    if isinstance(found, Tool):
        if options:
            raise UnknownName(f"option of the tool {name!r}:", next(iter(options)), ())
        return found
    if not callable(found):
        raise _no_tool(name, found)
    known = inspect.signature(found).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in known.values())
    for option in options:
        if option not in known and not open_ended:
            raise UnknownName(f"option of the tool {name!r}:", option, known)
    missing = [
        p.name
        for p in known.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        if p.name not in options
    ]
    if missing:
        raise UsageError(
            f"the tool {name!r} needs {', '.join(missing)}",
            hint="pass it as an option; a tool that is a function itself is marked by @agentgym.tools.tool",
        )
    made = found(**options)
    if isinstance(made, Tool):
        return made
    several = [t for t in made if isinstance(t, Tool)] if isinstance(made, Sequence) else []
    for one in several:
        if one.name == name.rpartition(":")[2]:
            return one
    if several:
        raise UnknownName(f"tool of {name!r}:", name, [t.name for t in several])
    raise _no_tool(name, made)


def _no_tool(name: str, found: object) -> UsageError:
    return UsageError(
        f"{name!r} gives a {type(found).__name__}, no tool",
        hint="mark a function by @agentgym.tools.tool, or return what tool(function) returns",
    )
