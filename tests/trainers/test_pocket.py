"""Pocket models: all follows from config and seed, mixed play, the tokenizer, and whole small runs."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from agentgym.errors import ConfigError, UsageError
from agentgym.messages import Message
from agentgym.policies import models
from agentgym.policies.base import Completion, TurnView
from agentgym.policies.templates import HuggingFaceRenderer, diagnose
from agentgym.trainers import launch, pocket
from agentgym.trainers.metrics import load as load_metrics
from agentgym.trainers.run import Silent

from .test_resume import Interrupted, Stop, resume, state

ASK = ["env=agentgym.testing:AskEnv", "env.kwargs.digits=3"]
SMALL = [
    "hidden=48", "layers=1", "vocabulary=300", "tokenizer_episodes=8", "demonstrations=64", "batch_rows=64",
    "optimiser.lr=5e-3", "rollout.max_tokens=4",
]  # fmt: skip
WHOLE = ["steps=120", "evaluation.every=120", "evaluation.episodes=60", "rollout.deterministic=true"]
TEXTS = [
    'open door, "door", go north 12; the answer is <answer>door</answer>\n',
    '<tool_call>\n{"name": "open", "arguments": {"what": "door"}}\n</tool_call>',
]
TOOLS = [
    {"name": "open", "parameters": {"type": "object", "properties": {"what": {}, "how": {}}}},
    {"type": "function", "function": {"name": "look"}},
]


def config(*overrides: str, env: Sequence[str] = ASK) -> Any:
    return launch.resolve("pocket", overrides=[*env, *SMALL, *overrides])[1]


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def weights(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setenv("AGENTGYM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "pocket"


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders that models were built into."""
    made: list[Path] = []
    real = pocket.build

    def counted(settings: Any, texts: Any, folder: Path) -> None:
        made.append(folder)
        real(settings, texts, folder)

    monkeypatch.setattr(pocket, "build", counted)
    return made


# What is built ----------------------------------------------------------------------------------


def test_two_builds_from_one_config_are_equal_byte_for_byte(tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    for name in ("a", "b"):
        pocket.build(config(), pocket.transcripts(config()), tmp_path / name)
    assert torch.equal(torch.random.get_rng_state(), before), "a build draws from a generator of its own"
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert {"model.safetensors", "tokenizer.json", "config.json"} <= files(tmp_path / "a").keys()


def test_another_seed_has_other_weights_and_other_games(tmp_path: Path) -> None:
    for seed in (0, 1):
        pocket.build(config(f"seed={seed}"), TEXTS, tmp_path / str(seed))
    one, other = weights(tmp_path / "0"), weights(tmp_path / "1")
    drawn = [name for name in one if "norm" not in name]
    assert drawn and not any(torch.equal(one[name], other[name]) for name in drawn)
    assert pocket.transcripts(config("seed=0")) != pocket.transcripts(config("seed=1"))


def test_the_model_has_the_shape_that_was_asked_for(tmp_path: Path) -> None:
    asked = config("hidden=40", "layers=3", "attention_heads=2", "tied=true", "context=77", "vocabulary=310")
    pocket.build(asked, pocket.transcripts(asked), tmp_path / "m")
    model, tokenizer = models.load(tmp_path / "m", dtype=torch.float32)
    shape = model.config
    assert (shape.hidden_size, shape.num_hidden_layers, shape.num_attention_heads) == (40, 3, 2)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert shape.max_position_embeddings == tokenizer.model_max_length == 77
    assert len(tokenizer) == shape.vocab_size <= 310
    pocket.build(config(), TEXTS, tmp_path / "apart")
    model, _ = models.load(tmp_path / "apart", dtype=torch.float32)
    assert model.lm_head.weight is not model.model.embed_tokens.weight


@pytest.mark.parametrize("wrong", ["hidden=50", "hidden=36"])
def test_a_width_that_no_head_can_rotate_is_refused(wrong: str) -> None:
    with pytest.raises(ConfigError, match=r"no even width.*\n.*of 8 here"):
        config(wrong)


# The cache --------------------------------------------------------------------------------------


def test_a_model_is_built_once_and_found_again(cache: Path, builds: list[Path]) -> None:
    first = pocket.prepare(config(), Silent())
    again = pocket.prepare(config(), Silent())
    resumed = pocket.prepare(first, Silent())  # with the config that it returned
    assert first == again == resumed and len(builds) == 1
    assert Path(first.model.name).parent == cache and models.is_model(Path(first.model.name))


@pytest.mark.parametrize(
    "change",
    [
        "seed=1", "hidden=64", "layers=2", "attention_heads=2", "vocabulary=320", "tied=true", "context=512",
        "spaces_apart=true", "random_share=0.1", "tokenizer_episodes=9", "rollout.system=Play.",
        "env.kwargs.digits=4", "env.list_actions=true", "env.parser=tags", "env.tasks=7", "env.split=valid",
    ],
)  # fmt: skip
def test_what_the_model_follows_from_is_in_its_name(change: str) -> None:
    assert pocket._key(config(change)) != pocket._key(config())


@pytest.mark.parametrize(
    "change",
    [
        "steps=7", "demonstrations=9", "batch_rows=2", "optimiser.lr=1", "evaluation.every=3",
        "rollout.concurrency=1", "rollout.deterministic=true", "rollout.layout=chat", "rollout.max_tokens=1",
        "rollout.max_sampled_tokens=1", "rollout.temperature=0", "max_failure_rate=0", "model.name=other",
    ],
)  # fmt: skip
def test_what_is_not_in_its_name_changes_no_transcript(change: str) -> None:
    assert pocket._key(config(change)) == pocket._key(config())
    assert pocket.transcripts(config(change)) == pocket.transcripts(config())


@pytest.mark.parametrize("setting", ["corpus={}", 'questions={{train="{}"}}'])
def test_a_file_written_anew_is_another_one(tmp_path: Path, setting: str) -> None:
    read = tmp_path / "read.jsonl"
    settings = ["env=agentgym/SearchQA-v0", f"env.kwargs.{setting.format(read)}"]
    names = []
    for text in ("one", "other", "one"):
        read.write_text(text)
        names.append(pocket._key(config(env=settings)))
    assert names[0] == names[2] != names[1]


def test_what_a_killed_build_left_does_no_harm(cache: Path, builds: list[Path]) -> None:
    key = pocket._key(config())
    building, lock = cache / f".{key}.building", cache / f".{key}.lock"
    building.mkdir(parents=True)
    lock.touch()
    (building / "config.json").write_text("{half")
    (building / "model-00001-of-00002.safetensors").write_bytes(b"half")
    made = Path(pocket.prepare(config(), Silent()).model.name)
    assert len(builds) == 1 and not building.exists()
    pocket.build(config(), pocket.transcripts(config()), cache / "fresh")
    assert files(made) == files(cache / "fresh")


def test_an_interrupted_build_leaves_nothing(
    cache: Path, builds: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        raise Interrupted

    with monkeypatch.context() as cut:
        cut.setattr(pocket.os, "replace", interrupted)
        with pytest.raises(Interrupted):
            pocket.prepare(config(), Silent())
    assert not [p for p in cache.iterdir() if p.is_dir()]
    assert models.is_model(Path(pocket.prepare(config(), Silent()).model.name))


def test_a_model_that_lost_its_weights_is_built_again(builds: list[Path]) -> None:
    made = Path(pocket.prepare(config(), Silent()).model.name)
    before = files(made)
    (made / "model.safetensors").unlink()
    pocket.prepare(config(), Silent())
    assert files(made) == before and len(builds) == 2


def test_two_that_need_it_at_once_build_it_once(builds: list[Path]) -> None:
    found: list[str] = []
    gate = threading.Barrier(2)

    def ask() -> None:
        gate.wait()
        found.append(pocket.prepare(config(), Silent()).model.name)

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(builds) == 1 and len(found) == 2 and found[0] == found[1]


KILLED = """
import os, sys
from agentgym.trainers import launch, pocket
from agentgym.trainers.run import Silent
pocket.os.replace = lambda *_: os._exit(9)
pocket.prepare(launch.resolve("pocket", overrides=sys.argv[1:])[1], Silent())
"""


@pytest.mark.slow
def test_a_build_of_a_process_that_died_is_equal_and_not_used(cache: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED, *ASK, *SMALL], env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 9
    (left,) = (p for p in cache.iterdir() if p.is_dir())
    assert left.name.endswith(".building")
    died = files(left)
    made = Path(pocket.prepare(config(), Silent()).model.name)
    assert not left.exists() and files(made) == died, "another process builds the same bytes"


# Mixed play -------------------------------------------------------------------------------------

PLAN = ("a", "b", "c")
OTHERS = ("x", "y", "z")


def play(share: float, seed: int = 0, plan: Sequence[str] = PLAN) -> pocket.MixedPlay:
    return pocket.MixedPlay({"t": plan}, OTHERS, share, seed)


def turn(
    history: Sequence[str] = (), listed: Sequence[str] | None = None, episode: str = "e", index: int = -1
) -> TurnView:
    number = len(history) if index < 0 else index
    return TurnView("env", "t", episode, number, (), None if listed is None else tuple(listed), (*history,))


@pytest.mark.parametrize(
    ("history", "expected"),
    [
        ((), "a"),
        (("a",), "b"),
        (("x", "a", "y"), "b"),
        (("b",), "a"),
        (("a", "a"), "b"),
        (("a", "c", "b"), "c"),
        (("a", "b", "c"), "c"),
        (("a", "x", "b", "y", "c", "z"), "c"),
    ],
)
def test_the_plan_goes_on_where_it_stopped(history: tuple[str, ...], expected: str) -> None:
    assert play(0.0)(turn(history)) == expected
    assert play(0.0)(turn(history, [*OTHERS, *PLAN])) == expected


def test_a_plan_may_hold_an_action_twice() -> None:
    again = play(0.0, plan=("go", "go", "take"))
    assert [again(turn(h)) for h in ((), ("go",), ("x", "go", "x", "go"))] == ["go", "go", "take"]


def test_play_that_left_the_plan_s_way_is_random_among_admissible() -> None:
    lost = play(1e-12)  # so small a share draws no turn by itself
    drawn = [lost(turn(("a",), OTHERS, f"e{i}")) for i in range(300)]
    assert all(70 < drawn.count(action) < 130 for action in OTHERS)
    assert lost(turn(("a",), ["b", *OTHERS])) == "b", "back on the way, the expert goes on"


@pytest.mark.parametrize("listed", [None, OTHERS, (*OTHERS, *PLAN)])
def test_without_randomness_it_is_the_expert_alone(listed: tuple[str, ...] | None) -> None:
    for seed in range(20):
        assert play(0.0, seed)(turn(("a",), listed, f"e{seed}")) == "b"


def test_with_nothing_but_randomness_no_plan_is_read() -> None:
    one, other = play(1.0), play(1.0, plan=("c", "b", "a"))
    turns = [turn(("a",), [*OTHERS, *PLAN], f"e{i}") for i in range(600)]
    drawn = [one(t) for t in turns]
    assert drawn == [other(t) for t in turns]
    assert all(70 < drawn.count(action) < 130 for action in (*OTHERS, *PLAN))
    unlisted = [one(turn((), None, f"e{i}")) for i in range(300)]
    assert all(70 < unlisted.count(action) < 130 for action in OTHERS)


@pytest.mark.parametrize("share", [0.1, 0.3, 0.8])
def test_the_share_is_that_of_random_turns(share: float) -> None:
    mixed = play(share)
    drawn = [
        mixed(turn((), OTHERS + PLAN[:1], f"e{i}", index=j)) in OTHERS for i in range(100) for j in range(20)
    ]
    assert sum(drawn) / len(drawn) == pytest.approx(share * 3 / 4, abs=0.04)


@given(
    taken=st.integers(0, 3),
    noise=st.lists(st.tuples(st.integers(0, 3), st.sampled_from(OTHERS)), max_size=6),
    listed=st.none() | st.sets(st.sampled_from((*PLAN, *OTHERS)), min_size=1).map(sorted),
    share=st.sampled_from([0.0, 1.0]) | st.floats(0, 1),
    seed=st.integers(0, 2**32),
)
def test_an_action_is_the_next_of_the_plan_or_an_admissible_one(
    taken: int, noise: list[tuple[int, str]], listed: list[str] | None, share: float, seed: int
) -> None:
    history = list(PLAN[:taken])
    for place, action in noise:  # what the random player did in between
        history.insert(place, action)
    expected = PLAN[min(taken, 2)]
    seen = turn(history, listed)
    action = play(share, seed)(seen)
    assert action == play(share, seed)(seen)
    if share == 0:
        assert action == expected
    else:
        assert action in (listed or [expected, *OTHERS])


def test_a_draw_follows_from_seed_episode_and_turn_alone() -> None:
    listed = [str(i) for i in range(1000)]
    action = play(1.0, 5)(turn((), listed, "e", 3))
    assert action == play(1.0, 5)(turn(("a", "x", "b"), listed, "e", 3))
    others = [play(1.0, 6)(turn((), listed, "e", 3)), play(1.0, 5)(turn((), listed, "f", 3))]
    assert action not in [*others, play(1.0, 5)(turn((), listed, "e", 4))]


@pytest.mark.parametrize("env", ["ColourEnv", "AskEnv"])
def test_the_expert_s_plans_cover_the_tasks_in_order(env: str) -> None:
    settings = config(env=[f"env=agentgym.testing:{env}"])
    policy, order = pocket.mixed_play(settings, 4)
    script = policy._script
    assert isinstance(script, pocket.MixedPlay)
    assert script.plans.keys() == {order[i] for i in range(4)}
    assert script.others == sorted({a for plan in script.plans.values() for a in plan})


def test_an_environment_without_an_expert_is_refused(tmp_path: Path) -> None:
    settings = config(env=["env=agentgym.testing:CrashEnv", "env.split=begin"])
    from agentgym.testing import CrashEnv

    with pytest.MonkeyPatch.context() as without:
        without.setattr(CrashEnv, "expert", lambda self, task: None)
        with pytest.raises(
            UsageError, match=r"no solution of the task 'begin-\w+' of agentgym.*CrashEnv"
        ) as e:
            launch.launch(pocket.POCKET, settings, tmp_path / "run")
    assert "choose an environment that has one" in e.value.hint
    assert not (tmp_path / "run").exists(), "said before there is a run"


def test_an_expert_that_wins_nothing_leaves_nothing_to_clone(tmp_path: Path) -> None:
    settings = config("random_share=0", "env.max_turns=1", "steps=1")
    with pytest.raises(UsageError, match="none of 64 episodes can be cloned") as caught:
        launch.launch(pocket.POCKET, settings, tmp_path / "run")
    assert "env.max_turns" in caught.value.hint


def test_of_mixed_play_all_is_cloned_and_of_an_expert_s_what_it_won(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given_rows: list[list[Any]] = []

    async def seen(settings: Any, run: Any, rows: list[Any]) -> None:
        given_rows.append(rows)

    monkeypatch.setattr(pocket.cloning, "fit", seen)
    for name, overrides in {"mixed": [], "expert": ["random_share=0"]}.items():
        launch.launch(pocket.POCKET, config(*overrides), tmp_path / name)
    mixed, expert = given_rows
    # Two turns an episode, a row a turn: both for play that lost too.
    assert [len(mixed), len(expert)] == [128, 128]
    assert (
        len({tuple(r.segment.token_ids) for r in expert})
        == 4
        < len({tuple(r.segment.token_ids) for r in mixed})
    )


# The tokenizer and its template -----------------------------------------------------------------


@pytest.fixture(scope="module", params=[False, True], ids=["spaces", "spaces_apart"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """As a run loads it: from its folder."""
    folder = tmp_path_factory.mktemp("pocket") / "m"
    settings = config(f"spaces_apart={str(request.param).lower()}", "vocabulary=400")
    pocket.build(settings, TEXTS * 4, folder)
    return models.load(folder)[1]


def test_marks_are_single_tokens_that_parsers_see(tokenizer: Any) -> None:
    for mark in (*pocket.MARKS, *pocket.SPECIAL):
        (token,) = tokenizer.encode(mark, add_special_tokens=False)
        assert tokenizer.decode([token]) == mark
        assert token in tokenizer.encode(f"a{mark}b {mark}\n", add_special_tokens=False)
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) == text
    assert not {*pocket.MARKS} & {*tokenizer.all_special_tokens}
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == (
        "<|im_end|>", "<|endoftext|>", None,
    )  # fmt: skip


def test_words_may_be_the_same_token_after_a_space_and_a_quote(tmp_path: Path) -> None:
    def of(text: str, apart: bool) -> list[int]:
        pocket.build(
            config(f"spaces_apart={str(apart).lower()}", "vocabulary=400"), TEXTS * 4, tmp_path / str(apart)
        )
        found = models.load(tmp_path / str(apart))[1].encode(text, add_special_tokens=False)
        return list(found)

    assert of('"door', True)[-1] == of(" door", True)[-1] and len(of(" door", True)) == 2
    assert of('"door', False)[-1] != of(" door", False)[-1] and len(of(" door", False)) == 1


@given(text=st.text(max_size=60))
def test_every_text_comes_back(tokenizer: Any, text: str) -> None:
    renderer = HuggingFaceRenderer(tokenizer)
    text = text.encode("utf-8", "replace").decode()
    assert renderer.decode(renderer.encode(text)) == text


MESSAGE = re.compile(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>\n", re.DOTALL)
WORDING = st.text(st.characters(exclude_categories=["Cs"]), max_size=30).filter(lambda t: "<|" not in t)


@given(
    st.lists(
        st.tuples(st.sampled_from(["user", "assistant", "tool"]), st.sampled_from(TEXTS) | WORDING),
        max_size=6,
    )
)
def test_the_template_keeps_a_tool_conversation(tokenizer: Any, said: list[tuple[str, str]]) -> None:
    renderer = HuggingFaceRenderer(tokenizer, tools=TOOLS)
    messages = [Message.of("system", "Play."), *(Message.of(role, text) for role, text in said)]  # type: ignore[arg-type]
    text = renderer.render(messages, generation_prompt=True)
    assert renderer.decode(renderer.encode(text)) == text
    head, *rest = MESSAGE.findall(text)
    assert head == ("tools", "\nopen what how\nlook".lstrip("\n")), "names and parameters"
    assert rest == [("system", "Play."), *said]
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")


def test_no_kind_of_turn_forks(tokenizer: Any) -> None:
    report = diagnose(HuggingFaceRenderer(tokenizer))
    assert {case.verdict for case in report.cases} == {"keeps"}
    assert report.knows_tools and report.knows_system and report.end_of_turn == "<|im_end|>"
    assert not report.doubles_bos and not report.lacks_bos


def test_a_tool_conversation_is_one_segment_with_the_rendered_text(tokenizer: Any) -> None:
    from agentgym.conversation import Conversation

    renderer = HuggingFaceRenderer(tokenizer).with_tools(TOOLS)
    talk = Conversation(renderer, system="Play.")
    messages = [Message.of("system", "Play.")]
    for role, observation, answer in [("user", "A door.", TEXTS[1]), ("tool", "It opens.", TEXTS[0])]:
        new = Message.of(role, observation)  # type: ignore[arg-type]
        talk.observe([new])
        ids = tuple(renderer.encode(answer + renderer.end_of_turn))
        talk.complete(Completion(answer, ids, (0.0,) * len(ids)))
        messages += [new, Message.of("assistant", answer)]
    assert not talk.forks and len(talk.segments) == 1
    whole = renderer.render(messages, generation_prompt=False)
    assert renderer.decode(talk.segments[0].token_ids) + "\n" == whole


# Whole runs -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cloned(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a whole run of the command."""
    from agentgym.cli import main

    folder = tmp_path_factory.mktemp("cloned")
    with pytest.MonkeyPatch.context() as here:
        here.setenv("AGENTGYM_CACHE", str(folder / "cache"))
        with pytest.raises(SystemExit) as ended:
            main(["train", "pocket", *ASK, *SMALL, *WHOLE, "--quiet", "--out", str(folder / "run")])
    assert ended.value.code == 0
    yield folder / "run"


def test_a_run_clones_what_was_played(cloned: Path) -> None:
    metrics = load_metrics(cloned)
    assert len(metrics) == 120
    assert metrics[119]["nll"] < 0.2 * metrics[0]["nll"]
    assert metrics[119]["eval/success"] > 0.4, "a player of random actions says the digit in 1 of 4 episodes"


def test_the_exported_folder_plays_legal_actions(cloned: Path) -> None:
    from agentgym.policies.transformers import TransformersPolicy
    from agentgym.registry import base, make
    from agentgym.rollout.engine import RolloutEngine
    from agentgym.trainers.collect import TaskOrder, collect, plan

    assert {"config.json", "model.safetensors", "tokenizer.json"} <= files(cloned / "model").keys()
    _, settings = launch.reopen(cloned)
    model, tokenizer = models.load(cloned / "model", dtype=torch.float32)
    for mark in pocket.MARKS:
        assert len(tokenizer.encode(mark, add_special_tokens=False)) == 1
    family = base(make(settings.env.id, **settings.env.kwargs))

    async def episodes() -> Any:
        policy = TransformersPolicy(model, tokenizer)
        engine = RolloutEngine(settings.env.stack(), policy, settings.rollout.engine(0, temperature=0.0))
        try:
            return await collect(
                engine, plan(TaskOrder(family.tasks("test"), 0), 0, 0, 10, 1), {}, max_failure_rate=0.0
            )
        finally:
            await engine.aclose()
            await policy.aclose()

    played = asyncio.run(episodes())
    assert [len(t.turns) for t in played] == [2] * 10
    assert all(t.valid_action for trajectory in played for t in trajectory.turns)
    assert all(trajectory.turns[0].action == "ask" for trajectory in played), "what most play begins with"


CUT = ["steps=6", "batch_rows=16", "checkpoint_every=2", "evaluation.every=3", "evaluation.episodes=4"]
# What is cloned is the same in any order of play; only the evaluation's samples need it.
CUT.append("rollout.deterministic=true")


@pytest.fixture(scope="module")
def uncut(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uncut")
    with pytest.MonkeyPatch.context() as here:
        here.setenv("AGENTGYM_CACHE", str(folder / "cache"))
        launch.launch(pocket.POCKET, config(*CUT), folder / "run")
    return folder / "run"


@pytest.mark.parametrize("stop", [{"turn": 50}, {"turn": 131}, {"step": 0}, {"step": 4}], ids=str)
def test_x16_an_interrupted_run_ends_with_the_same_weights(
    uncut: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: dict[str, int]
) -> None:
    """In play, in an evaluation, before and after a checkpoint."""
    monkeypatch.setenv("AGENTGYM_CACHE", str(uncut.parent / "cache"))
    with pytest.raises(Interrupted):
        launch.launch(pocket.POCKET, config(*CUT), tmp_path / "cut", progress=Stop(**stop))
    resume(tmp_path / "cut")
    assert state(tmp_path / "cut") == state(uncut)
    assert files(tmp_path / "cut" / "model") == files(uncut / "model")


def test_play_that_was_cut_goes_on_with_the_plan(tmp_path: Path) -> None:
    """Without the deterministic mode finished turns are kept, and the same actions follow them."""
    settings = config("steps=6", "rollout.concurrency=3")
    launch.launch(pocket.POCKET, settings, tmp_path / "whole")
    first, second = Stop(turn=50), Stop()
    with pytest.raises(Interrupted):
        launch.launch(pocket.POCKET, settings, tmp_path / "cut", progress=first)
    resume(tmp_path / "cut", second)
    assert not {*first.told[:-1]} & {*second.told}
    assert files(tmp_path / "cut" / "model") == files(tmp_path / "whole" / "model")
