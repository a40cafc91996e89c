from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentgym.environments.text.textworld import TextWorld
from agentgym.environments.text.textworld_commands import LONGEST_COMMAND, clean, normal_form, refusal


@pytest.mark.parametrize(
    "command",
    ["look", "go north", "take Henderson's non-euclidean keycard from type 7 safe", "x coin", "red", "n"],
)
def test_commands_to_the_player_pass(command):
    assert refusal(command) is None


@pytest.mark.parametrize(
    "command",
    [
        *(
            "quit",
            "Q",
            "RESTART",
            "restore",
            "save",
            "script",
            "transcript on",
            "undo",
            "again",
            "g",
            "oops x",
        ),
        *(
            "superbriefly",
            "transcripts",
            "restrict commands",
            "enable print state option",
            "tw-trace-actions",
        ),
        *(
            "me, save",
            "look. save",
            "look then quit",
            "look\nquit",
            "print_state",
            "look\x00",
            "\x1b[A",
            "löok",
        ),
        *("", "x" * (LONGEST_COMMAND + 1)),
    ],
)
def test_everything_else_is_refused_with_a_reason(command):
    assert refusal(command)


@given(st.text())
def test_what_passes_is_one_short_line_of_plain_characters(text):
    command = normal_form(text)
    if refusal(command) is None:
        assert 0 < len(command) <= LONGEST_COMMAND
        assert command.isascii() and command.isprintable() and not set(command) & set('.,;:"<>[]_*')


def test_a_closing_full_stop_is_no_second_command():
    assert normal_form(" take coin.\n") == "take coin"


def test_no_verb_of_the_dictionary_that_passes_ends_the_game_or_writes_a_file(
    begun: Callable[..., TextWorld], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    env = begun("Cooking")
    verbs = [str(w) for w in env._play.unwrapped._jericho.get_dictionary() if w.is_verb]
    assert {"take", "quit", "save", "script", "cook"} <= set(verbs) and len(verbs) > 100
    first = env.step("look")[0]
    for verb in verbs:
        for action in (verb, f"{verb} on", f"me, {verb}", f"look then {verb}"):
            _, _, terminated, _, _ = env.step(action)
            assert not terminated, action
    room, *_, info = env.step("look")
    assert info["valid_action"] and room.splitlines()[0] == first.splitlines()[0]
    assert list(tmp_path.iterdir()) == []


def test_clean_keeps_what_the_game_says():
    printed = (
        "\nYou pick up the coin from the ground.\n\n\nYour score has just gone up by one point.\n\n\n"
        "                 *** The End ***\n\nYou scored 1 out of a possible 1, in 11 turns.\n\n\n"
        "Would you like to RESTART, RESTORE a saved game, QUIT or UNDO the last command?\n"
        ">                                   -= Dish-Pit =-0/10"
    )
    assert clean(printed) == (
        "You pick up the coin from the ground.\n\nYour score has just gone up by one point.\n\n"
        "*** The End ***\n\nYou scored 1 out of a possible 1, in 11 turns."
    )
