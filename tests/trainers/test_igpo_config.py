"""IGPO's settings and metrics: what is refused before anything is sampled, the floor, errors of tools."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from agentgym.errors import AgentGymError, ConfigError, UsageError
from agentgym.messages import TextPart
from agentgym.outcome import Outcome
from agentgym.trainers import launch
from agentgym.trainers.igpo import IGPOSection, Shares, turn_advantages
from agentgym.trainers.igpo_metrics import tool_metrics
from agentgym.trainers.run import Silent
from agentgym.trajectory import Trajectory

Make = Callable[..., Any]


# Refused at the start ---------------------------------------------------------------------------


class Watch(Silent):
    """Which phases a run came to."""

    def __init__(self) -> None:
        self.phases: list[str] = []

    def phase(self, text: str) -> None:
        self.phases.append(text)


@pytest.fixture
def questions(tmp_path: Path) -> list[str]:
    """Settings of SearchQA over one question and one passage."""
    pytest.importorskip("bm25s")
    lines = {
        "questions": {"id": "q", "question": "Where is it?", "answers": ["table"], "split": "train"},
        "corpus": {"title": "Kitchen", "text": "The apple is on the table."},
    }
    for name, line in lines.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(line))
    files = [f"env.kwargs.{name}={json.dumps(str(tmp_path / f'{name}.jsonl'))}" for name in lines]
    return ["env=agentgym/SearchQA-v0", 'env.kwargs.data="files"', *files]


def refusal(folder: Path, *overrides: str) -> tuple[AgentGymError, list[str]]:
    """What stops a run with IGPO, and the phases it came to."""
    algorithm, config = launch.resolve(
        "igpo", overrides=["trackers=[]", "model.autocast=none", "rollout.max_tokens=4", *overrides]
    )
    watch = Watch()
    with pytest.raises(AgentGymError) as caught:
        launch.launch(algorithm, config, folder, progress=watch)
    return caught.value, watch.phases


def test_tasks_without_answers_are_refused_before_the_first_collection(
    tiny_model: Path, tmp_path: Path
) -> None:
    error, phases = refusal(
        tmp_path / "r", "env=agentgym.testing:EchoEnv", "env.kwargs.words=2", f"model={tiny_model}"
    )
    assert isinstance(error, ConfigError) and "igpo needs gold answers" in str(error)
    assert "SearchQA" in error.hint and "sampling" not in phases


def test_a_tokenizer_without_offsets_is_refused_before_the_first_collection(
    tiny_model: Path, tmp_path: Path, questions: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import PreTrainedTokenizerFast

    monkeypatch.setattr(PreTrainedTokenizerFast, "is_fast", False)
    error, phases = refusal(tmp_path / "r", *questions, f"model={tiny_model}")
    assert isinstance(error, UsageError) and "which characters a token stands for" in str(error)
    assert "sampling" not in phases


def test_a_model_that_the_block_mask_does_not_fit_is_refused_before_the_first_collection(
    tiny_model: Path, tmp_path: Path, questions: list[str]
) -> None:
    windowed = tmp_path / "windowed"
    shutil.copytree(tiny_model, windowed)
    config = json.loads((windowed / "config.json").read_text())
    config["sliding_window"] = 8
    (windowed / "config.json").write_text(json.dumps(config))
    error, phases = refusal(tmp_path / "r", *questions, f"model={windowed}")
    assert "form='batched'" in error.hint and "sampling" not in phases


# The floor --------------------------------------------------------------------------------------


def shares(scores: Sequence[Sequence[float]], outcomes: Sequence[float], **section: Any) -> Shares:
    def f64(values: Sequence[float]) -> Tensor:
        return torch.tensor(list(values), dtype=torch.float64)

    return turn_advantages(
        f64([s for own in scores for s in own]),
        f64(outcomes),
        torch.tensor([i for i, own in enumerate(scores) for _ in own]),
        torch.zeros(len(scores), dtype=torch.long),
        torch.ones(len(scores), dtype=torch.bool),
        IGPOSection(**section),
    )


@pytest.mark.parametrize("norm", ["separate", "joint"])
def test_the_floor_acts_on_gains_alone(norm: str) -> None:
    scores, outcomes = [[-2.0, -1.0, -0.5], [-2.0, -2.5]], [1.0, 0.0]
    plain, floored = (shares(scores, outcomes, norm=norm, std_floor=floor) for floor in (0.0, 10.0))
    assert torch.equal(floored.z_outcome, plain.z_outcome)
    assert 0 < float(floored.z_gain.abs().max()) < 0.2 < float(plain.z_gain.abs().max())
    assert torch.equal(shares(scores, outcomes, norm=norm, std_floor=1e-6).z_gain, plain.z_gain)


# Metrics ----------------------------------------------------------------------------------------


def called(trajectory: Trajectory, *turns: tuple[int, str]) -> Trajectory:
    """Turns with so many calls each, and the text that answered them."""
    for i, (calls, _) in enumerate(turns):
        action = json.dumps([{"name": "search", "arguments": {}}] * calls) if calls else "<answer>x</answer>"
        read = turns[i - 1][1] if i else "question"
        trajectory.turns[i] = dataclasses.replace(
            trajectory.turns[i], action=action, observation=(TextPart(read),)
        )
    trajectory.final_observation = (TextPart(turns[-1][1]),)
    return trajectory


def test_errors_of_tools_are_counted_call_by_call(make_trajectory: Make) -> None:
    three = ((3, 2),) * 3
    good = called(
        make_trajectory("a", lengths=three),
        (1, "[1] A page: Error: is a word in it"),
        (
            3,
            "Result 1, search:\nError: no page\n\nResult 2, search:\nfound\n\nResult 3, open:\nError: x",
        ),
        (0, "Error: not a call's"),
    )
    cut = called(make_trajectory("b"), (1, "Error: there is no tool 'look'"))
    lost = called(make_trajectory("c", outcome=Outcome.infra_failed("tool")), (1, "Error: broken"))
    assert tool_metrics([good, cut, lost]) == {"env/tool_error_frac": 3 / 5}
    assert tool_metrics([good]) == {"env/tool_error_frac": 2 / 4}
    assert tool_metrics([make_trajectory("d"), lost]) == {} == tool_metrics([])


def test_a_prompt_that_was_too_long_for_a_turn_has_no_calls(make_trajectory: Make) -> None:
    """The episode is valid, and ended before its first turn."""
    unread = make_trajectory("a", lengths=(), outcome=Outcome.truncated("context"))
    unread.final_observation = (TextPart("Error: is how the question begins"),)
    assert unread.valid and not unread.turns
    assert tool_metrics([unread]) == {}
    spoken = called(make_trajectory("b"), (1, "Error: there is no tool 'look'"))
    assert tool_metrics([unread, spoken]) == {"env/tool_error_frac": 1.0}


def test_errors_of_searchqa_are_logged(tiny_model: Path, tmp_path: Path, questions: list[str]) -> None:
    """The words by which errors are told apart are those of the family's own tools."""
    from agentgym import make
    from agentgym.messages import text_of
    from agentgym.trajectory import Turn

    _, config = launch.resolve("igpo", overrides=[*questions, f"model={tiny_model}"])
    env = make(config.env.id, **config.env.kwargs)
    told, info = env.reset(options={"task_id": "q"})
    turns: list[Turn] = []
    calls = [("open", {"name": "Atlantis"}), ("open", {"name": "Kitchen"}), ("look", {})]
    for chosen in ([calls[0]], [calls[1]], [calls[2]], calls):
        action = json.dumps([{"name": name, "arguments": arguments} for name, arguments in chosen])
        turns.append(Turn(len(turns), 0, (0, 0), told, "c", action, 0.0))
        told, _, _, _, info = env.step(action)
        turns[-1] = dataclasses.replace(turns[-1], valid_action=info["valid_action"])

    def content(x: Any) -> Any:
        return (TextPart(x),) if isinstance(x, str) else x

    turns = [dataclasses.replace(turn, observation=content(turn.observation)) for turn in turns]
    played = Trajectory("a", "e", "q", turns=turns, outcome=Outcome.completed())
    played.final_observation = content(told)
    assert text_of(played.final_observation).startswith("Result 1, open:\nError: ")
    assert tool_metrics([played]) == {"env/tool_error_frac": info["tool_errors"] / info["tool_calls"]}
    assert (info["tool_errors"], info["tool_calls"]) == (4, 6)
