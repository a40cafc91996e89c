from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentgym import errors
from agentgym.messages import ImagePart, TextPart
from agentgym.rollout import worker
from agentgym.rollout.host import Reply

anything = st.text(st.characters(codec=None, exclude_categories=()))  # lone surrogates too


@given(st.lists(st.builds(TextPart, anything) | st.builds(ImagePart, st.binary())), anything, st.floats())
def test_a_reply_crosses_the_pipe_unchanged(parts: list[Any], text: str, reward: float) -> None:
    reply = Reply(tuple(parts), reward, True, False, {"action": text, "admissible_actions": [text]})
    frame = worker.pack(worker.reply_to_json(reply))
    assert worker.frame_length(frame[:4]) == len(frame) - 4
    back = worker.reply_from_json(worker.unpack(frame[4:]))
    assert repr(back) == repr(reply)  # NaN too


def test_a_pair_of_surrogates_is_not_joined() -> None:
    assert worker.unpack(worker.pack("\ud83d\ude00")[4:]) == "\ud83d\ude00" != "\U0001f600"


@pytest.mark.parametrize(
    "error",
    [
        errors.UnknownName("task", "a", ["b", "ab"]),
        errors.MissingDependency("textworld", "text"),
        errors.ToolFailed("broke", hint="mend it"),
        errors.DeadlineExceeded("start", 3, boundary="sandbox"),
    ],
)
def test_an_error_of_the_library_crosses_as_it_is(error: errors.AgentGymError) -> None:
    back = worker.error_from_json(worker.unpack(worker.pack(worker.error_to_json("step", error))[4:]))
    assert type(back) is type(error)
    assert str(back) == str(error)
    assert vars(back) == vars(error)
    assert getattr(back, "boundary", None) == getattr(error, "boundary", None)


def test_any_other_error_is_the_environments() -> None:
    back = worker.error_from_json(worker.error_to_json("step", KeyError("door")))
    assert isinstance(back, errors.EnvironmentFailed)
    assert back.message == "step raised KeyError: 'door'"


def test_an_error_of_another_package_is_its_nearest_ancestor() -> None:
    class Full(errors.SandboxFailed):
        pass

    back = worker.error_from_json(worker.error_to_json("step", Full("full")))
    assert type(back) is errors.SandboxFailed
