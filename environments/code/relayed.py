"""What runs inside the two sandboxes of a relay: the judge with its tests, and the code that is judged.

Invariant: between the two only plain values cross (:func:`encoded`), as lines of ASCII; what a line holds is
rebuilt from its tags, never executed. So an object with a mind of its own stays where it was made.

This file is sent into sandboxes and runs there by itself: it imports nothing but the standard library, and
runs on any Python from 3.9 on.
"""

from __future__ import annotations

import builtins
import json
import os
import random
import sys
from collections.abc import Callable
from typing import Any

LONGEST = 1 << 20
"""Bytes of the longest line."""

DEEPEST = 64
"""Deepest nesting of a value."""

RAISED = (
    "ArithmeticError",
    "AssertionError",
    "AttributeError",
    "IndexError",
    "KeyError",
    "NameError",
    "OSError",
    "OverflowError",
    "RecursionError",
    "RuntimeError",
    "TypeError",
    "ValueError",
    "ZeroDivisionError",
)
"""Exceptions that cross as themselves; any other crosses as an ``Exception``. Not ``StopIteration``: it would
end a loop of the tests without failing it."""

Told = dict[str, Any]
Ask = Callable[[], str]
Answer = Callable[[str], None]

_HOLDERS: dict[str, Any] = {"l": list, "t": tuple, "s": set, "z": frozenset}


def encoded(value: Any, depth: int = DEEPEST) -> Any:
    """``value`` as JSON can say it, exactly and with its type.

    Numbers, strings, bytes, ``None``, and lists, tuples, sets and dicts of them; an instance of a subclass
    crosses as what it is a subclass of.

    Raises:
        ValueError: It is something else, or nested too deeply.
    """
    if depth == 0:
        raise ValueError("the value is nested too deeply")
    if value is None or value is True or value is False:
        return value
    if isinstance(value, int):
        return ["i", hex(int(value))]
    if isinstance(value, float):
        return ["f", float.hex(float(value))]
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, complex):
        return ["c", float.hex(value.real), float.hex(value.imag)]
    if isinstance(value, (bytes, bytearray)):
        return ["b", bytes(value).hex()]
    if isinstance(value, dict):
        return ["d", [[encoded(k, depth - 1), encoded(v, depth - 1)] for k, v in dict.items(value)]]
    for tag, kind in _HOLDERS.items():
        if isinstance(value, kind):
            return [tag, [encoded(item, depth - 1) for item in kind.__iter__(value)]]
    raise ValueError(f"a {type(value).__name__} is no plain value")


def decoded(given: Any) -> Any:
    """The value that :func:`encoded` wrote.

    Raises:
        ValueError: It wrote nothing like that.
    """
    if given is None or isinstance(given, (bool, str)):
        return given
    if not isinstance(given, list) or len(given) < 2:
        raise ValueError("that is no value")
    tag, content = given[0], given[1]
    if tag == "i":
        return int(content, 16)
    if tag == "f":
        return float.fromhex(content)
    if tag == "c":
        return complex(float.fromhex(content), float.fromhex(given[2]))
    if tag == "b":
        return bytes.fromhex(content)
    if tag == "d":
        return {decoded(key): decoded(value) for key, value in content}
    if tag in _HOLDERS:
        return _HOLDERS[tag]([decoded(item) for item in content])
    raise ValueError("that is no value")


def line(value: Any) -> str:
    """A value as one line.

    Raises:
        ValueError: It is no plain value, or too long.
    """
    text = json.dumps(encoded(value), separators=(",", ":"))
    if len(text) > LONGEST - 8:
        raise ValueError(f"the value takes {len(text)} characters, more than {LONGEST - 8}")
    return text


def judge(told: Told, ask: Ask, answer: Answer) -> None:
    """Run the tests against the code on the other side."""

    def candidate(*args: Any, **kwargs: Any) -> Any:
        answer("?" + line((args, kwargs)))
        reply = ask()
        if reply[:1] == "=":
            return decoded(json.loads(reply[1:]))
        name, message = json.loads(reply[1:])
        raise (getattr(builtins, name) if name in RAISED else Exception)(message)

    random.seed(0)
    namespace: dict[str, Any] = {"__name__": "tests"}
    exec(compile(told["program"], "tests.py", "exec"), namespace)
    answer("ready")
    try:
        namespace["check"](candidate)
    except Exception as error:
        answer("failed" + json.dumps([type(error).__name__, str(error)[:500]]))
    else:
        answer("passed")


def candidate(told: Told, ask: Ask, answer: Answer) -> None:
    """Answer calls of the code that is judged."""
    namespace: dict[str, Any] = {"__name__": "solution"}
    try:
        for program in told["programs"]:
            exec(compile(program, "solution.py", "exec"), namespace)
        function = namespace[told["function"]]
    except Exception as error:
        failed = error

        def function(*args: Any, **kwargs: Any) -> Any:
            raise failed

    while True:
        args, kwargs = decoded(json.loads(ask()))
        try:
            reply = "=" + line(function(*args, **kwargs))
        except Exception as error:
            reply = "!" + json.dumps([type(error).__name__[:100], str(error)[:500]])
        answer(reply)


def main(role: str) -> None:
    """Speak over what were the standard streams; what the code prints goes nowhere."""
    incoming = os.fdopen(os.dup(0), "r", encoding="ascii", newline="\n")
    outgoing = os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)

    def ask() -> str:
        return incoming.readline() or sys.exit()

    def answer(text: str) -> None:
        outgoing.write(text.encode("ascii") + b"\n")
        outgoing.flush()

    {"judge": judge, "candidate": candidate}[role](json.loads(ask()), ask, answer)


if __name__ == "__main__":
    main(sys.argv[1])
