"""Episodes as text: complete, in order, and harmless."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from rich.console import Console, RenderableType

from agentgym.messages import ImagePart, TextPart
from agentgym.outcome import Outcome
from agentgym.trajectory import Segment, Trajectory, Turn
from agentgym.viewer import episodes

HOSTILE = "\x1b[2J\x1b]0;owned\x07[bold]:smile:[/bold][/]"


def show(renderable: RenderableType, *, colour: bool = False) -> str:
    out = io.StringIO()
    system = "truecolor" if colour else None
    Console(file=out, width=200, force_terminal=colour, color_system=system).print(renderable)
    return out.getvalue()


@pytest.fixture
def won() -> Trajectory:
    segment = Segment()
    segment.append_context([72, 105, 32])
    spans = [segment.append_sampled([103, 111], [-0.1, -5.0])]
    segment.append_context([33])
    spans.append(segment.append_sampled([226, 130, 172], [-0.1, -0.1, -0.1]))
    first = Turn(0, 0, spans[0], (TextPart("A hall."),), "go", "go", 0.0, seconds={"generate": 1.25})
    second = Turn(
        1, 0, spans[1], (TextPart("A room."), ImagePart(b"\x89PNG")), "<a>take</a>", "take", 1.0,
        success=True, finish_reason="length",
    )  # fmt: skip
    return Trajectory(
        "e0", "agentgym/Rooms-v0", "room-7", split="test", env_seed=5, instruction="Find it.",
        segments=[segment], turns=[first, second], final_observation=(TextPart("Well done."),),
        outcome=Outcome.completed(), scores={"style": 0.5},
    )  # fmt: skip


def spell(ids: Sequence[int]) -> str:
    return bytes(ids).decode(errors="replace")


def test_an_episode_is_shown_whole_and_in_order(won: Trajectory) -> None:
    shown = show(episodes.episode(won))
    parts = [
        "e0", "room-7", "Find it.", "turn 1", "generate 1.25 s", "A hall.", "> go", "turn 2", "reward +1",
        "3 tokens", "finish: length", "A room.", "image/png, 4 bytes", "> <a>take</a>", "action: take",
        "Well done.", "completed", "solved", "reward 1", "2 turns", "5 tokens sampled", "style 0.5",
    ]  # fmt: skip
    places = [shown.index(part) for part in parts]
    assert places == sorted(places)


def test_an_instruction_that_the_observation_repeats_is_shown_once(won: Trajectory) -> None:
    won.turns[0] = replace(won.turns[0], observation=(TextPart("Find it. A hall."),))
    assert show(episodes.episode(won)).count("Find it.") == 1


@pytest.mark.parametrize("view", [episodes.episode, lambda t: episodes.index([t])])
def test_hostile_text_neither_acts_nor_is_read_as_markup(
    won: Trajectory, view: Callable[[Trajectory], RenderableType]
) -> None:
    hostile = replace(
        won.turns[0], observation=(TextPart(HOSTILE),), completion=HOSTILE, action=HOSTILE + "!"
    )
    won.turns.insert(0, hostile)
    won.id = won.task_id = won.instruction = HOSTILE
    won.final_observation = (TextPart(HOSTILE),)
    won.outcome = Outcome.infra_failed("tool", HOSTILE)
    shown = show(view(won))
    assert "\x1b" not in shown and "\x07" not in shown
    assert "[bold]:smile:" in shown


def test_a_lost_or_running_episode_shows_no_reward(won: Trajectory) -> None:
    won.scores = {}
    won.outcome = Outcome.infra_failed("environment", "the worker died")
    assert episodes.summary(won) == ("e0", "room-7", "infra_failed(environment)", "", "", "2", "5")
    assert "the worker died" in show(episodes.episode(won))
    won.outcome = None
    assert episodes.summary(won)[2:5] == ("running", "", "")
    assert "running" in show(episodes.episode(won))


def test_an_action_that_was_not_understood_is_marked(won: Trajectory) -> None:
    won.turns[0] = replace(won.turns[0], valid_action=False, action="")
    shown = show(episodes.episode(won))
    assert "not understood" in shown and "none could be read" in shown


def test_sampled_tokens_are_coloured_by_how_likely_they_were(won: Trajectory) -> None:
    shown = show(episodes.tokens(won, lambda: spell), colour=True)
    assert "\x1b[2mHi \x1b[0m" in shown
    assert "\x1b[1;32mg\x1b[0m\x1b[1;33mo\x1b[0m\x1b[2m!\x1b[0m" in shown
    # The three tokens of one character are one piece.
    assert "\x1b[1;32m€\x1b[0m" in shown
    assert "segment 0: 9 tokens, 5 sampled" in shown


def test_without_a_tokenizer_ids_are_shown(won: Trajectory) -> None:
    shown = show(episodes.tokens(won, lambda: None))
    assert "72 105 32 103 111 33 226 130 172" in shown and "--model" in shown


def test_without_tokens_no_tokenizer_is_asked_for(won: Trajectory) -> None:
    def never() -> None:
        raise AssertionError

    won.segments = []
    assert "speaks text" in show(episodes.tokens(won, never))


def test_a_truncated_character_at_the_end_is_shown_and_hostile_tokens_do_not_act() -> None:
    segment = Segment()
    segment.append_context([27, 91, 50, 74])
    segment.append_sampled([226, 130], [-0.1, -0.1])
    trajectory = Trajectory("e0", "x", "t", segments=[segment])
    shown = show(episodes.tokens(trajectory, lambda: spell))
    assert "␛[2J\ufffd" in shown and "\x1b" not in shown
