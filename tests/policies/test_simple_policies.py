from __future__ import annotations

import asyncio
import io
import logging
import signal
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
from rich.console import Console

import agentgym
from agentgym.actions import TagParser, make_parser
from agentgym.errors import ModelUnavailable, PolicyFailed, UnknownName, UsageError
from agentgym.journal import Journal
from agentgym.messages import Content, ImagePart, TextPart, as_content
from agentgym.outcome import Outcome
from agentgym.policies import POLICIES, make_policy
from agentgym.policies.base import Completion, Policy, PolicyContext, Request, Sampling, TurnView
from agentgym.policies.expert import ExpertPolicy, NopPolicy
from agentgym.policies.human import HumanPolicy, PlayerLeft
from agentgym.policies.replay import ReplayPolicy
from agentgym.policies.simple import RandomPolicy, ScriptedPolicy
from agentgym.testing import EchoEnv
from agentgym.trajectory import Segment, Trajectory, Turn

ECHO = "agentgym.testing:EchoEnv"
LISTED = ("look", "go east", "go west")


def request(
    turn: int = 0,
    *,
    seed: int = 0,
    task: str = "echo-test-0",
    episode: str = "e0",
    admissible: Sequence[str] | None = LISTED,
    history: Sequence[str] = (),
    observation: Content | str = "A room.",
) -> Request:
    listed = None if admissible is None else tuple(admissible)
    view = TurnView(ECHO, task, episode, turn, as_content(observation), listed, tuple(history))
    return Request(episode, (), Sampling(), seed, view)


def answers(policy: Policy, *requests: Request) -> list[str]:
    async def ask() -> list[Completion]:
        return await policy.generate(requests)

    return [completion.text for completion in asyncio.run(ask())]


class TestRandom:
    def test_is_uniform_over_the_list(self) -> None:
        drawn = Counter(answers(RandomPolicy(), *(request(seed=s) for s in range(3000))))
        assert set(drawn) == set(LISTED)
        assert all(abs(count - 1000) < 100 for count in drawn.values())

    def test_depends_on_the_requests_seed_alone(self) -> None:
        policy = RandomPolicy()
        first = answers(policy, *(request(turn, seed=turn) for turn in range(20)))
        assert answers(policy, *(request(turn, seed=turn) for turn in range(20))) == first
        assert [answers(RandomPolicy(), request(9, seed=s))[0] for s in range(20)] == first

    @pytest.mark.parametrize("listed", [None, ()])
    def test_without_a_list_it_draws_from_the_action_space(self, listed: Sequence[str] | None) -> None:
        drawn = answers(RandomPolicy(), *(request(seed=s, admissible=listed) for s in range(50)))
        space = agentgym.spaces.Text()
        assert all(space.contains(text) and text.isprintable() and len(text) <= 64 for text in drawn)
        assert len(set(drawn)) > 40
        assert drawn == answers(RandomPolicy(), *(request(seed=s, admissible=listed) for s in range(50)))

    def test_answers_in_the_configured_format(self) -> None:
        policy = make_policy("random", PolicyContext(options={"parser": "tags"}))
        assert answers(policy, request(admissible=["look"])) == ["<action>look</action>"]


class Slow(EchoEnv):
    """Counts its instances and its plans, and knows no plan for one task."""

    made: ClassVar[list[Slow]] = []
    asked: ClassVar[list[tuple[str, str]]] = []

    def __init__(self, turns: int = 3) -> None:
        super().__init__(turns)
        self.made.append(self)

    def expert(self, task: agentgym.Task) -> Sequence[str]:
        self.asked.append((task.id, threading.current_thread().name))
        return [] if task.id == "echo-test-15" else super().expert(task)


SLOW = f"{Slow.__module__}:Slow"


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Slow]]:
    # The file is no importable module: the name resolves to the class itself.
    monkeypatch.setattr("agentgym.plugins.import_path", lambda path: Slow)
    Slow.made.clear()
    Slow.asked.clear()
    yield Slow


class TestExpert:
    def test_plays_the_plan_and_then_its_last_action(self) -> None:
        plan = list(EchoEnv(3).expert(EchoEnv().find_task("echo-test-4")))
        policy = make_policy("expert", PolicyContext(ECHO, {"turns": 3}))
        assert answers(policy, *(request(turn, task="echo-test-4") for turn in range(5))) == [
            *plan,
            plan[2],
            plan[2],
        ]
        asyncio.run(policy.aclose())
        asyncio.run(policy.aclose())

    def test_asks_once_a_task_on_a_thread_of_its_own(self, slow: type[Slow]) -> None:
        async def many() -> None:
            policy = ExpertPolicy(PolicyContext(SLOW))
            tasks = [f"echo-test-{i % 4}" for i in range(16)]
            await asyncio.gather(*(policy.generate([request(task=task)]) for task in tasks))
            assert not slow.made[0]._closed
            await policy.aclose()

        asyncio.run(many())
        assert sorted(task for task, _ in slow.asked) == [f"echo-test-{i}" for i in range(4)]
        assert all(thread.startswith("agentgym-expert") for _, thread in slow.asked)
        assert len(slow.made) == 1 and slow.made[0]._closed

    def test_answers_in_the_configured_format(self) -> None:
        options = {"parser": "tags", "parser_options": {"require_thought": True}}
        policy = make_policy("expert", PolicyContext(ECHO, options=options))
        [text] = answers(policy, request())
        assert text.startswith("<think></think><action>")
        asyncio.run(policy.aclose())

    def test_noise_comes_at_its_rate_and_the_plan_goes_on_where_it_stopped(self) -> None:
        policy = ExpertPolicy(PolicyContext(ECHO, {"turns": 4}), epsilon=0.25)
        plan = list(EchoEnv(4).expert(EchoEnv().find_task("echo-test-0")))
        first = Counter(answers(policy, *(request(seed=s) for s in range(2000))))
        assert abs(first[plan[0]] - 1500) < 100
        assert sum(first[action] for action in LISTED) == 2000 - first[plan[0]]
        history = [plan[0], "look", plan[1], "go east"]
        drawn = answers(policy, *(request(4, seed=s, history=history) for s in range(40)))
        assert plan[2] in drawn and set(drawn) <= {plan[2], *LISTED}
        asyncio.run(policy.aclose())

    def test_a_task_without_a_plan_is_an_error_that_says_so(self, slow: type[Slow]) -> None:
        policy = ExpertPolicy(PolicyContext(SLOW))
        with pytest.raises(UsageError, match="no solution of the task 'echo-test-15'"):
            answers(policy, request(task="echo-test-15"))
        with pytest.raises(UnknownName, match="unknown task"):
            answers(policy, request(task="echo-test-99"))
        asyncio.run(policy.aclose())

    def test_is_called_oracle_too(self) -> None:
        expert, oracle = (make_policy(name, PolicyContext(ECHO)) for name in ("expert", "oracle"))
        assert (expert.name, oracle.name) == ("expert", "oracle")
        assert answers(expert, request()) == answers(oracle, request())
        for policy in (expert, oracle):
            asyncio.run(policy.aclose())

    def test_nop_does_what_the_environment_says_does_nothing(
        self, slow: type[Slow], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        policy = NopPolicy(PolicyContext(SLOW), TagParser())
        assert answers(policy, request(0), request(7)) == ["", ""]
        asyncio.run(policy.aclose())
        monkeypatch.setattr(slow, "nop", lambda self, task: ["look", "submit nothing"], raising=False)
        policy = NopPolicy(PolicyContext(SLOW), TagParser())
        wrapped = [TagParser().format(action) for action in ("look", "submit nothing", "submit nothing")]
        assert answers(policy, request(0), request(1), request(2)) == wrapped
        asyncio.run(policy.aclose())

    def test_needs_an_environment_and_a_probability(self) -> None:
        with pytest.raises(UsageError, match="none is named"):
            make_policy("expert")
        with pytest.raises(UsageError, match="epsilon"):
            ExpertPolicy(PolicyContext(ECHO), epsilon=1.5)


class TestScripted:
    def test_a_list_whose_last_action_is_repeated(self) -> None:
        policy = ScriptedPolicy(["look", "go east"])
        assert answers(policy, *map(request, range(4))) == ["look", "go east", "go east", "go east"]

    def test_a_list_a_task(self) -> None:
        policy = ScriptedPolicy({"a": ["look"], "b": ["go"]})
        assert answers(policy, request(task="b"), request(task="a")) == ["go", "look"]
        with pytest.raises(UsageError, match="no actions for the task 'c'"):
            answers(policy, request(task="c"))

    def test_a_function_of_the_turn(self) -> None:
        policy = ScriptedPolicy(lambda turn: f"{turn.turn} {turn.admissible_actions}")
        assert answers(policy, request(2, admissible=["x"])) == ["2 ('x',)"]

    def test_raw_unless_a_format_is_given(self) -> None:
        assert answers(ScriptedPolicy(["<action>look"]), request()) == ["<action>look"]
        assert answers(ScriptedPolicy(["look"], make_parser("tags")), request()) == ["<action>look</action>"]

    @pytest.mark.parametrize("script", [[], "look", {"a": []}, {"a": "look"}])
    def test_what_is_no_script(self, script: Any) -> None:
        with pytest.raises(UsageError, match="no list of actions"):
            ScriptedPolicy(script)


def recorded(id: str, task: str, completions: Sequence[str], *, tokens: bool = False) -> Trajectory:
    trajectory = Trajectory(id=id, env_id=ECHO, task_id=task, outcome=Outcome.completed())
    segment = Segment()
    for index, text in enumerate(completions):
        span = (0, 0)
        if tokens:
            segment.append_context([1, 2, 3])
            span = segment.append_sampled([10 + index, 11], [-0.5, -0.25 * index])
        trajectory.turns.append(
            Turn(
                index, 0, span, as_content("seen"), text, text, 0.0, finish_reason="length", policy_version=7
            )
        )
    trajectory.segments = [segment] if tokens else []
    return trajectory


class TestReplay:
    def test_the_same_episode_and_else_the_first_of_the_task(self) -> None:
        runs = [recorded("e0", "a", ["0"]), recorded("e1", "a", ["1"]), recorded("e2", "b", ["2"])]
        policy = ReplayPolicy({run.id: run for run in runs})
        asked = (request(task="a", episode=e) for e in ("e1", "e0", "new"))
        assert answers(policy, *asked, request(task="b", episode="new")) == ["1", "0", "0", "2"]

    def test_tokens_as_they_were_sampled(self) -> None:
        run = recorded("e0", "a", ["x", "y"], tokens=True)
        [completion] = asyncio.run(ReplayPolicy({"e0": run}).generate([request(1)]))
        assert completion == Completion("y", (11, 11), (-0.5, -0.25), "length", 7)

    def test_what_is_missing_is_logged_and_fails_the_policy(self, caplog: pytest.LogCaptureFixture) -> None:
        policy = ReplayPolicy({"e0": recorded("e0", "a", ["x"])})
        with caplog.at_level(logging.WARNING):
            with pytest.raises(PolicyFailed, match="neither episode 'e9' nor task 'b'"):
                answers(policy, request(task="b", episode="e9"))
            with pytest.raises(PolicyFailed, match="ends before turn 1"):
                answers(policy, request(1))
        assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]

    def test_from_a_journal(self, tmp_path: Path) -> None:
        run = recorded("e0", "a", [])
        whole = recorded("e0", "a", ["x", "y"], tokens=True)
        run.outcome, run.segments = None, [Segment()]
        with Journal.create(tmp_path / "run", {}) as journal:
            journal.begin(run)
            run.segments = whole.segments
            for turn in whole.turns:
                run.turns.append(turn)
                journal.turn(run)
            run.outcome = Outcome.completed()
            journal.end(run)
        policy = make_policy(
            "replay", PolicyContext(options={"run": str(tmp_path / "run"), "parser": "tags"})
        )
        assert answers(policy, request(0), request(1)) == ["x", "y"]
        with pytest.raises(UsageError, match="needs the option 'run'"):
            make_policy("replay")


class Person:
    """Types prepared lines, then ends the input."""

    def __init__(self, *lines: str) -> None:
        self.lines = list(lines)
        self.screen = io.StringIO()

    def __call__(self, prompt: str) -> str:
        if not self.lines:
            raise EOFError
        return self.lines.pop(0)

    def policy(self, parser: str = "plain") -> HumanPolicy:
        console = Console(file=self.screen, width=60, force_terminal=True, color_system=None)
        return HumanPolicy(make_parser(parser), console, self)


class TestHuman:
    def test_types_an_action_or_picks_a_number(self) -> None:
        assert answers(Person("  jump ").policy(), request()) == ["jump"]
        assert answers(Person("", "2").policy(), request()) == ["go east"]
        assert answers(Person("7").policy(), request()) == ["7"]
        assert answers(Person("2").policy(), request(admissible=["5", "2", "9"])) == ["2"]
        assert answers(Person("2").policy(), request(admissible=None)) == ["2"]

    def test_sees_the_observation_and_the_actions_as_text(self) -> None:
        person = Person("1")
        observation = (TextPart("[bold]A \x1b[31mroom"), ImagePart(b"1234"))
        answers(person.policy(), request(observation=observation))
        shown = person.screen.getvalue()
        assert "[bold]A ␛[31mroom" in shown and "[image/png, 4 bytes]" in shown
        assert "   2  go east" in shown and "\x1b" not in shown

    def test_answers_in_the_configured_format_and_may_type_again(self) -> None:
        person = Person("<action>", "look")
        assert answers(person.policy("tags"), request()) == ["<action>look</action>"]
        assert "cannot carry" in person.screen.getvalue()

    def test_the_end_of_input_is_no_failure(self) -> None:
        with pytest.raises(PlayerLeft):
            answers(Person().policy(), request())
        assert issubclass(PlayerLeft, KeyboardInterrupt)

    def test_ctrl_c_while_reading_interrupts_at_once(self) -> None:
        def read(prompt: str) -> str:
            signal.raise_signal(signal.SIGINT)
            raise AssertionError("the reading went on")

        before = signal.getsignal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            answers(HumanPolicy(read=read), request())
        assert signal.getsignal(signal.SIGINT) is before

    def test_plays_one_episode_at_a_time(self) -> None:
        with pytest.raises(UsageError, match="one episode at a time"):
            answers(Person("x").policy(), request(), request())


class Loud(Policy):
    """What a third party writes: made from a context."""

    def __init__(self, context: PolicyContext) -> None:
        self.word = str(context.options["word"])

    async def generate(self, requests: Sequence[Request]) -> list[Completion]:
        return [Completion(self.word.upper()) for _ in requests]


class TestMakePolicy:
    def test_builtin_ones_are_policies(self) -> None:
        script = PolicyContext(ECHO, options={"script": ["look"]})
        assert isinstance(make_policy("scripted", script), ScriptedPolicy)
        assert isinstance(make_policy("human"), HumanPolicy)
        assert make_policy("random").renderer is None
        assert set(POLICIES) == {"expert", "human", "nop", "oracle", "random", "replay", "scripted"}

    def test_an_import_path_gets_the_context(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(
            "agentgym.plugins.import_path", {"some.package:Loud": Loud, "a:b": len}.__getitem__
        )
        policy = make_policy("some.package:Loud", PolicyContext(options={"word": "hey"}))
        assert answers(policy, request()) == ["HEY"]

    def test_what_makes_no_policy_is_refused(self) -> None:
        with pytest.raises(UsageError, match="no policy"):
            make_policy("agentgym.policies.base:PolicyContext")
        with pytest.raises(UsageError, match="cannot import"):
            make_policy("no.such.module:Policy")

    def test_an_unknown_option_names_the_near_ones(self) -> None:
        with pytest.raises(UnknownName, match="did you mean 'epsilon'"):
            make_policy("expert", PolicyContext(ECHO, options={"epsilom": 0.1}))
        with pytest.raises(UnknownName, match="'tags'"):
            make_policy("random", PolicyContext(options={"parser": "tag"}))

    def test_another_name_is_a_models(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Model(RandomPolicy):
            def __init__(self, model: str = "", tokenizer: Any = None, max_batch: int = 1) -> None:
                super().__init__()
                if model.startswith("rand"):
                    raise ModelUnavailable(f"no model {model!r}", hint="download it")
                self.made = model, max_batch

        monkeypatch.setattr("agentgym.policies.plugins.import_path", lambda path: Model)
        options = {"max_batch": 4, "parser": "tags"}
        assert make_policy("org/some-model", PolicyContext(options=options)).made == ("org/some-model", 4)  # type: ignore[attr-defined]
        assert make_policy("C:/models/x").made == ("C:/models/x", 1)  # type: ignore[attr-defined]
        with pytest.raises(ModelUnavailable, match=r"did you mean the policy 'random'\? Or: download it"):
            make_policy("randon")
        with pytest.raises(ModelUnavailable, match="hint: download it"):
            make_policy("rand-large-model")
        with pytest.raises(UnknownName, match="'max_batch'"):
            make_policy("org/some-model", PolicyContext(options={"maxbatch": 4}))


def test_an_episode_of_each_cheap_policy_through_the_stack() -> None:
    """The formats that policies write are those that the stack reads."""
    from agentgym.wrappers.stack import EnvConfig

    config = EnvConfig(ECHO, {"turns": 2}, parser="tags")
    options = {"parser": "tags"}
    for name, won in (("expert", True), ("oracle", True), ("random", None)):
        policy = make_policy(name, PolicyContext(config.id, dict(config.kwargs), options))
        env = config.build()
        _, info = env.reset(seed=0, options={"task_id": "echo-test-3"})
        for turn in range(2):
            asked = request(turn, seed=turn, task="echo-test-3", admissible=info["admissible_actions"])
            *_, info = env.step(answers(policy, asked)[0])
            assert info["valid_action"] is True
        assert won is None or info["success"] is won
        asyncio.run(policy.aclose())
