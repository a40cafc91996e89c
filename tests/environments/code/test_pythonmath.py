r"""PythonMath: its problems, how answers are compared, and what an episode is worth."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from fractions import Fraction
from itertools import combinations, permutations, product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import agentgym
from agentgym.actions import write_calls
from agentgym.environments.code import pythonmath_problems as problems
from agentgym.environments.code import sympy_pack
from agentgym.environments.code.boxed import LONGEST, TAIL, boxed, number, plain, same
from agentgym.environments.code.pythonmath import PythonMath
from agentgym.environments.code.symbolic import SPEC, compare
from agentgym.errors import DataUnavailable, JudgeFailed, UnknownName, UsageError
from agentgym.messages import ToolCall
from agentgym.registry import base
from agentgym.sandboxes import Sandbox, make_backend

sympy = pytest.importorskip("sympy")
from agentgym.environments.code.symbolic_judge import verdict  # noqa: E402 - it needs SymPy


@pytest.fixture
def env(unsafe: Mapping[str, Any]) -> Iterator[PythonMath]:
    made = PythonMath(**unsafe)
    yield made
    made.close()


def call(name: str, **arguments: Any) -> str:
    return write_calls([ToolCall(name, arguments)])


class TestProblems:
    def test_thousands_in_three_splits_that_share_nothing(self, env: PythonMath) -> None:
        sizes = {split: len(env.tasks(split)) for split in env.splits}
        assert sizes == {"train": 10_000, "valid": 625, "test": 625}
        questions = [task.instruction for split in env.splits for task in env.tasks(split)]
        assert len(set(questions)) == len(questions) == 11_250
        assert "kind" in env.find_task("dice-0").metadata

    def test_every_answer_is_exact(self) -> None:
        for name in problems.KINDS:
            for number_ in range(0, problems.COUNT, 45):
                question, answer = problems.problem(f"{name}-{number_}")
                assert question and "." not in answer and verdict(answer, plain(answer)) == "same", (
                    name,
                    answer,
                )

    @pytest.mark.parametrize(
        ("kind", "about", "answer"),
        [
            ("divisors", (12, 2), 4),
            ("coprime", (10, 4), 25),
            ("powmod", (3, 4, 7), 4),
            ("remainders", (1, 2, 3, 7, 11, 17), 2 * 7 * 11 * 17 // 2 - 2),
            ("zeros", (10, 10), 2),
            ("digits", (2, 10), 7),
            ("primes", (2, 20, 4), 3),
            ("paths", (2, 2, 1, 1), 2),
            ("coins", (10, 2, 5, 7), 2),
            ("multiples", (12, 2, 3, 5), 6),
            ("dice", (2, 6, 11), Fraction(1, 12)),
            ("urn", (2, 2, 2, 1), Fraction(2, 3)),
            ("ruin", (2, 1, 2, 3), Fraction(2, 5)),
            ("recurrence", (1, 1, 1, 1, 10, 1000), 55),
            ("series", (3, 1, 1), Fraction(3, 10)),
            ("coefficient", (2, -1, 3, 2, 4), 4),
            ("interpolation", ((1, 2, 3), (1, 0, -4)), "x^2 - 4"),
            ("quadratic", (1, -2, -1), r"1 + \sqrt{2}"),
            ("quadratic", (2, 1, -1), r"\frac{1}{2}"),
            ("system", (((1, 0, 0), (0, 2, 0), (0, 0, 4)), (1, 1, 1)), Fraction(7, 4)),
            ("determinant", (((2, 0, 0), (5, 3, 0), (7, 1, 4)),), 24),
            ("polygon", ((1, 1), (-1, 1), (-1, -1), (1, -1)), 4),
            ("heron", (3, 4, 5), "6"),
            ("heron", (2, 2, 2), r"\sqrt{3}"),
            ("lattice", (4, 1, 1), 13),
        ],
    )
    def test_known_answers(self, kind: str, about: tuple[Any, ...], answer: Any) -> None:
        found = problems.KINDS[kind].solve(*about)
        if kind == "remainders":
            assert isinstance(found, int) and (found % 7, found % 11, found % 17) == (1, 2, 3)
            assert 0 < found <= 7 * 11 * 17
        else:
            assert found == answer

    def test_counted_answers_are_those_of_counting(self) -> None:
        for n, letter, run in ((5, "A", 2), (6, "C", 3)):
            counted = sum(letter * run not in "".join(word) for word in product("ABC", repeat=n))
            assert problems.KINDS["strings"].solve(n, letter, run) == counted
        for n, m in ((36, 4), (49, 2), (4_096, 8), (9_973, 5)):
            counted = sum(k for k in range(1, n + 1) if n % k == 0 and k % m)
            assert problems.KINDS["divisors"].solve(n, m) == counted
        for n, a, b, c, gap in ((5, 1, 2, 3, 1), (6, 4, 1, 5, 2), (7, 2, 3, 1, 3)):
            counted = 0
            for order in permutations(range(1, n + 1)):
                left, right = order.index(a), order.index(b)
                counted += right - left == gap + 1 and c not in order[left:right]
            assert problems.KINDS["seating"].solve(n, a, b, c, gap) == counted
        drawn = list(combinations("rrrbb", 3))
        share = Fraction(sum(hand.count("r") == 2 for hand in drawn), len(drawn))
        assert problems.KINDS["urn"].solve(3, 2, 3, 2) == share

    @given(st.integers(1, 500), st.integers(1, 60))
    def test_a_surd_is_the_root_in_lowest_terms(self, over: int, under: int) -> None:
        told = problems.surd(Fraction(over, under))
        assert verdict(told, f"\\sqrt{{{over}/{under}}}") == "same"
        assert "sqrt" in told or math.isqrt(over * under) ** 2 == over * under

    def test_no_answer_is_worth_giving_whatever_is_asked(self) -> None:
        every: Counter[str] = Counter()
        for name in problems.KINDS:
            told = Counter(problems.problem(f"{name}-{number_}").answer for number_ in range(problems.COUNT))
            answer, times = told.most_common(1)[0]
            assert times <= problems.COUNT / 20, (name, answer)
            every += told
        assert every.most_common(1)[0][1] <= every.total() / 100

    def test_a_problem_is_the_same_for_ever(self) -> None:
        assert problems.problem("recurrence-0") == problems.Problem(
            "Let $a_1 = 2$, $a_2 = 7$ and $a_n = 9 a_{n-1} + 1 a_{n-2}$ for n > 2. "
            "What is the remainder when $a_{282}$ is divided by 1592?",
            "49",
        )


class TestBoxed:
    @pytest.mark.parametrize(
        ("text", "inside"),
        [
            (r"so \boxed{3}", "3"),
            (r"\boxed{1} or \boxed{ \frac{1}{2} }.", r"\frac{1}{2}"),
            (r"\fbox{4} then \boxed{unclosed", "4"),
            ("no box", None),
            (r"\boxed{}", ""),
            (r"\boxed{" + "x" * (LONGEST + 1) + "}", None),
            (r"\boxed{1}" + " " * TAIL, None),
        ],
    )
    def test_the_last_closed_box_counts(self, text: str, inside: str | None) -> None:
        assert boxed(text) == inside

    @pytest.mark.parametrize(
        "bomb", [r"\boxed{" * 10**6, "{" * 10**7, r"\boxed{" + "{" * 10**6, "\\" * 10**6]
    )
    def test_a_long_text_takes_no_time(self, bomb: str) -> None:
        began = time.perf_counter()
        assert boxed(bomb) is None
        assert same(bomb, "1") is False
        assert time.perf_counter() - began < 1.0

    @pytest.mark.parametrize(
        ("text", "value"),
        [
            ("12", 12),
            ("-1,234,567", -1234567),
            ("0.5", Fraction(1, 2)),
            (".25", Fraction(1, 4)),
            ("3/4", Fraction(3, 4)),
            ("-3/-4", Fraction(3, 4)),
            (r"-\frac{1}{3}", Fraction(-1, 3)),
            ("25%", Fraction(1, 4)),
            ("3 1/2", Fraction(7, 2)),
            (r"-3\frac{1}{2}", Fraction(-7, 2)),
            ("1 000/3", Fraction(1000, 3)),
            ("1,23", None),
            ("1e5", None),
            ("1/0", None),
            (r"\frac{1}{0}", None),
            ("१२", None),
            ("1_000", None),
            ("0x10", None),
            ("nan", None),
            ("--1", None),
        ],
    )
    def test_a_number_is_digits_and_nothing_else(self, text: str, value: Any) -> None:
        assert number(text) == value

    @pytest.mark.parametrize(
        ("answer", "reference", "verdict_"),
        [
            (r"$\dfrac12$", "0.5", True),
            (r"1\,000", "1000", True),
            (r"\text{Tuesday}.", "tuesday", True),
            (r"90^\circ", "90", True),
            ("3", "4", False),
            ("I do not know", "7", False),
            ("none", "7", False),
            ("x = 5", "5", True),
            (r"\theta=90^\circ", "90", True),
            ("(5)", "5", True),
            ("-(1/2)", r"-\frac{1}{2}", True),
            ("(-1)/2", r"-\frac{1}{2}", True),
            (r"\{ 5 \}", "5", True),
            (r"3\tfrac12", "3.5", True),
            ("50\\%", "0.5", True),
            ("2+2", "4", False),
            ("2(2)", "4", False),
            ("x = 2 + 3", "5", False),
            ("4/1/1", "4", False),
            ("(1)(0)", "10", False),
            ("2^2", "4", False),
            ("2x", "2", False),
            ("", "", False),
            ("x+1", "1+x", None),
            ("pi", "3", False),
            ("pi", "2pi", None),
            ("9" * (LONGEST + 1), "9", False),
        ],
    )
    def test_what_needs_no_algebra_is_decided_here(
        self, answer: str, reference: str, verdict_: bool | None
    ) -> None:
        assert same(answer, reference) is verdict_

    @given(st.text(max_size=60), st.text(max_size=60))
    def test_any_text_is_answered(self, left: str, right: str) -> None:
        assert same(left, right) in (True, False, None)


SAME = [
    (r"\frac{\sqrt{2}}{2}", r"1/\sqrt 2"),
    ("2*sqrt(3)", r"\sqrt{12}"),
    ("(x+1)**2", "x^2+2x+1"),
    ("x=5", "5"),
    ("y = 2x + 1", "2x - y + 1 = 0"),
    ("(1, 1/2)", r"(1,\frac{1}{2})"),
    ("2, 1", r"\{1, 2\}"),
    (r"2\pm\sqrt3", r"2-\sqrt{3}, 2+\sqrt{3}"),
    (r"(-\infty, 3] \cup (5, 6)", r"(5,6) \cup (-\infty,3]"),
    (r"3\frac{1}{2}", "7/2"),
    (r"x^2\frac{1}{2}", "x^2/2"),
    ("a_1 + a_{2}", "a_2+a_1"),
    (r"\frac{x^2-1}{x-1}", "x+1"),
]
ONE_WAY = [
    ("5!/2 + x", "60 + x"),
    (r"\binom{5}{2}x", "10x"),
    (r"x\sin^2 x + x\cos^2 x", "x"),
    (r"e^{i\pi}x", "-x"),
    (r"x\log_2 8", "3x"),
    (r"|1-\sqrt{2}|", r"\sqrt2-1"),
    (r"x\sqrt[3]{8}", "2x"),
    (r"3 \cdot 10^5 x", "300000x"),
    ("x^9+9x^8+36x^7+84x^6+126x^5+126x^4+84x^3+36x^2+9x+1", "(x+1)^9"),
]
"""What is the same where the first is the reference; the other way round, the first leaves work over."""
UNFINISHED = [
    ("2+2", "4"),
    ("6^{4166} - 618 floor(6^{4166}/618)", "342"),
    ("5!/2", "60"),
    (r"\sqrt{19(19-5)(19-15)(19-18)}", r"2\sqrt{266}"),
    (r"\sqrt{19*14*4}", r"2\sqrt{266}"),
    (r"\sqrt{19}\sqrt{14}\sqrt{3}", r"\sqrt{798}"),
    (r"\frac{16+\sqrt{16^2+4*3*8}}{6}", r"\frac{8}{3} + \frac{2\sqrt{22}}{3}"),
    (r"2\sqrt{22}*4", r"8\sqrt{22}"),
    (r"\sqrt{22}/2/3", r"\frac{\sqrt{22}}{6}"),
    (r"\frac{1/2}{3}x", r"\frac{x}{6}"),
    (r"\sqrt{2}+\sqrt{2}", r"2\sqrt{2}"),
    (r"4\arctan(1)", r"\pi"),
    (r"\ceil(0.5)\pi", r"\pi"),
    ("2x + 3x", "5x"),
    ("x + 2 + 3", "x + 5"),
    ("x^{1+1}", "x^2"),
    ("(1+1, 3)", "(2, 3)"),
    ("1*2, 3", "2, 3"),
    ("x = 2 + 3", "x = 5"),
    (r"\sqrt{x^2+10x+25}", "x+5"),
    (
        r"\frac{3(x-1)(x-2)}{2} + \frac{5(x-2)(x-3)}{7} + \frac{4(x-3)(x-1)}{9}",
        "6x^2 - 13x + 11",
    ),
    ("1." + "4142135623730950488016887242096980785696718753769480731766797379", r"\sqrt{2}"),
]
DIFFERENT = [
    ("5-x", "|x-5|"),
    ("x-5", "|x-5|"),
    ("x", "|x|"),
    ("x", r"\sqrt{x^2}"),
    (r"x + y\sqrt{2}", r"x + |y|\sqrt{2}"),
    ("2x+3=13", "x=5"),
    ("1.41421356237309504880168872", r"\sqrt{2}"),
    ("x^2+2x+2", "(x+1)^2"),
    ("(1,2)", "(2,1)"),
    ("[1,2)", "(1,2)"),
    ("1,2", "2"),
    ("1,2,3", "1,2"),
    ("0.3333333333", "1/3"),
    ("x", "y"),
    ("x", "5"),
    ("0=0", "y=2x"),
    ("1/0", "1"),
    ("0/0", "0"),
    (r"\infty", r"-\infty"),
    ("2x", "x"),
]
ATTACKS = [
    "__import__('os').system('touch owned')",
    "exec('1')",
    "().__class__.__bases__[0].__subclasses__()",
    "9**9**9**9",
    "9^{9^{9^{9}}}",
    "x^{99999999999}",
    "e^{10^{10}}",
    "100000!",
    "10000!!!",
    r"\binom{10^9}{5}",
    "(" * 400 + "1" + ")" * 400,
    "{" * 400 + "1",
    r"\frac{" * 100,
    "-" * 900 + "1",
    "|" * 300,
    "1" + "^2" * 400,
    "lambda: 0",
    "\x00\ud800",
    r"\pm" * 200 + "1",
    "x" * 900,
]


class TestAlgebra:
    @pytest.mark.parametrize(("answer", "reference"), SAME)
    def test_same(self, answer: str, reference: str) -> None:
        assert verdict(plain(answer), plain(reference)) == "same"
        assert verdict(plain(reference), plain(answer)) == "same"

    @pytest.mark.parametrize(("reference", "answer"), ONE_WAY)
    def test_an_answer_may_be_simpler_than_its_reference(self, reference: str, answer: str) -> None:
        assert verdict(plain(answer), plain(reference)) == "same"
        assert verdict(plain(reference), plain(answer)) == "unfinished"

    @pytest.mark.parametrize(("answer", "reference"), UNFINISHED)
    def test_what_leaves_work_over_is_not_taken(self, answer: str, reference: str) -> None:
        assert verdict(plain(answer), plain(reference)) == "unfinished"

    @pytest.mark.parametrize(
        ("answer", "reference"),
        [
            (r"\frac{16+\sqrt{352}}{6}", r"\frac{8}{3} + \frac{2\sqrt{22}}{3}"),
            (r"\frac{1}{4}\sqrt{17024}", r"2\sqrt{266}"),
            ("1064^{1/2}", r"2\sqrt{266}"),
            (r"\frac{\pi\cdot 3}{4}", r"\frac{3\pi}{4}"),
            ("2^{100}", "1267650600228229401496703205376 + 0"),
            ("-(x-1)(x+2) - 3", "-x^2 - x - 1"),
            (r"\log x + \ln y", r"\ln(xy)"),
            (r"\sqrt{x}\sqrt{x+1}", r"\sqrt{x^2+x}"),
            (r"\ln(x^2)", r"2\ln x"),
            (r"\arcsin x", r"\arcsin x"),
            (r"\sqrt{1-x^2}\sqrt{x-x^2}", r"(1-x)\sqrt{x+x^2}"),
            (r"a^b a^c", "a^{b+c}"),
        ],
    )
    def test_another_way_to_write_what_is_calculated(self, answer: str, reference: str) -> None:
        assert verdict(plain(answer), plain(reference)) == "same"

    @pytest.mark.parametrize(("answer", "reference"), DIFFERENT)
    def test_different(self, answer: str, reference: str) -> None:
        assert verdict(plain(answer), plain(reference)) == "different"

    @pytest.mark.parametrize("attack", ATTACKS)
    def test_nothing_is_executed_and_little_is_computed(self, attack: str) -> None:
        began = time.perf_counter()
        assert verdict(plain(attack), "7") in ("different", "unfinished", "unreadable answer")
        assert time.perf_counter() - began < 5.0

    @settings(max_examples=200, deadline=None)
    @given(st.text("0123456789x+-*/^(){}[]|,=!\\ .", max_size=12))
    def test_any_text_is_answered(self, text: str) -> None:
        if not set("^!") & set(text):
            assert verdict(text, "7") in ("same", "different", "unfinished", "unreadable answer")

    def test_it_says_which_cannot_be_read(self) -> None:
        assert verdict("?", "1") == "unreadable answer" and verdict("1", "?") == "unreadable reference"


class TestSandboxed:
    def compared(self, where: Mapping[str, Any], *pairs: tuple[str, str], seconds: float = 20.0) -> list[str]:
        async def play() -> list[str]:
            async with make_backend(where["sandbox"], **where.get("sandbox_options", {})) as backend:
                found = []
                for answer, reference in pairs:
                    async with await backend.start(SPEC) as sandbox:
                        found.append(await compare(sandbox, answer, reference, seconds=seconds))
                return found

        return asyncio.run(play())

    def test_sympy_is_brought_along(self, sandboxed: Mapping[str, Any]) -> None:
        pairs = (r"\sqrt{8}", r"2\sqrt 2"), ("x", "y"), ("__import__('os')", "1"), ("9" * 2_000, "x")
        assert self.compared(sandboxed, *pairs) == [
            "same",
            "different",
            "unreadable answer",
            "unreadable answer",
        ]

    def test_what_takes_too_long_is_not_the_same(self, unsafe: Mapping[str, Any]) -> None:
        assert self.compared(unsafe, ("x", "x+0"), seconds=0.0) == ["time"]

    def test_a_judge_that_does_not_start_is_no_verdict(
        self, unsafe: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def nothing(sandbox: Sandbox) -> None:
            await sandbox.write(sympy_pack.FILE, b"")

        monkeypatch.setattr("agentgym.environments.code.symbolic.give_sympy", nothing)
        with pytest.raises(JudgeFailed, match="does not start"):
            self.compared(unsafe, ("x", "x+0"))


class TestEpisode:
    def begin(self, env: PythonMath, task_id: str) -> str:
        return env.reset(seed=0, options={"task_id": task_id})[0]

    def test_compute_then_answer(self, sandboxed: Mapping[str, Any]) -> None:
        env = PythonMath(**sandboxed)
        observation = self.begin(env, "recurrence-0")
        assert observation.startswith("Let $a_1 = 2$") and r"\boxed{…}" in observation
        observation, *_ = env.step(call("python", code="a, b = 2, 7\nfor _ in range(281): a, b = b, 9*b + a"))
        assert observation == "(no output)"
        assert env.step(call("python", code="a % 1592"))[0] == "49"
        observation, *_ = env.step(call("python", code="import sympy; print(sympy.factor('x**2-1'))"))
        assert observation == "(x - 1)*(x + 1)"
        observation, reward, terminated, _, info = env.step(r"The answer is $\boxed{49}$.")
        assert (observation, reward, terminated) == ("The answer was taken.", 1.0, True)
        assert info["success"] and info["compared"] == "plain" and info["role"] == "tool"
        env.close()

    @pytest.mark.parametrize(
        ("action", "reward"),
        [
            (r"\boxed{49}", 1.0),
            (call("submit", answer="49"), 1.0),
            (call("submit", answer=r"it is \boxed{49.0}"), 1.0),
            (r"\boxed{48}", 0.0),
            (call("submit", answer="none"), 0.0),
            (r"\boxed{__import__('os').system('echo same')}", 0.0),
            (call("submit", answer="7" * 10**7), 0.0),
        ],
    )
    def test_answers(self, env: PythonMath, action: str, reward: float) -> None:
        self.begin(env, "recurrence-0")
        _, got, terminated, _, info = env.step(action)
        assert (got, terminated, info["success"]) == (reward, True, bool(reward))

    def test_an_answer_may_be_written_another_way(self, env: PythonMath) -> None:
        task = env.find_task("interpolation-0")
        assert task.private["answer"] == "-5x^2 - 7x + 5"
        for answer, how in (
            ("5 - 7*x - 5*x**2", "same"),
            ("5-7x", "different"),
            ("5 - 4x - 3x - 5x^2", "unfinished"),
            ("import os", "unreadable answer"),
        ):
            self.begin(env, task.id)
            _, reward, *_, info = env.step(rf"\boxed{{{answer}}}")
            assert (reward, info["compared"]) == (float(how == "same"), how)

    @pytest.mark.parametrize(
        ("task_id", "question"),
        [
            ("powmod-0", r"6^{4166} - 618 \lfloor 6^{4166}/618 \rfloor"),
            ("powmod-0", "6^{4166} - 618 floor(6^{4166}/618)"),
            ("paths-0", r"\binom{10}{4} - \binom{5}{2}\binom{5}{2}"),
            ("urn-0", r"\frac{\binom{13}{2}\binom{6}{4}}{\binom{19}{6}}"),
            ("ruin-0", r"\frac{1-(7/3)^5}{1-(7/3)^{10}}"),
            ("heron-0", r"\sqrt{19(19-5)(19-15)(19-18)}"),
            ("quadratic-0", r"\frac{16+\sqrt{16^2+4*3*8}}{6}"),
            ("determinant-0", "-7(2*8-9*(-6))+1(-9*8-9*(-2))-1((-9)(-6)-2(-2))"),
        ],
    )
    def test_the_question_is_no_answer(self, env: PythonMath, task_id: str, question: str) -> None:
        self.begin(env, task_id)
        assert env.step(rf"\boxed{{{question}}}")[1] == 0.0

    def test_words_without_an_answer_are_refused(self, env: PythonMath) -> None:
        self.begin(env, "recurrence-0")
        observation, reward, terminated, _, info = env.step("It must be 49.")
        assert r"There is no answer in \boxed{…}" in observation
        assert (reward, terminated, info["valid_action"], info["role"]) == (0.0, False, False, "user")

    def test_an_interpreter_that_ends_its_sandbox_gets_another(self, env: PythonMath) -> None:
        self.begin(env, "recurrence-0")
        env.step(call("python", code="x = 1"))
        observation, _, terminated, *_ = env.step(call("python", code="import os; os.kill(os.getppid(), 9)"))
        assert "a new one was started" in observation and not terminated
        assert "NameError" in env.step(call("python", code="x"))[0]
        assert env.step(call("python", code="import sympy; sympy.pi > 3"))[0] == "True"

    def test_the_answer_is_hidden(self, env: PythonMath) -> None:
        for id in ("recurrence-0", "series-3", "quadratic-1"):
            _, info = env.reset(seed=0, options={"task_id": id})
            answer = env.task.private["answer"]
            assert answer not in json.dumps(info).replace(env.task.instruction, "")
            assert "answer=" not in repr(env.task) and f"'{answer}'" not in repr(env.task)
            assert env.expert(env.task) == [rf"\boxed{{{answer}}}"]

    def test_a_fork_has_the_interpreters_names(self, env: PythonMath) -> None:
        self.begin(env, "recurrence-0")
        env.step(call("python", code="x = 41"))
        other = agentgym.fork(env)
        assert other.step(call("python", code="x + 1"))[0] == "42"
        other.close()


class TestFiles:
    def test_a_file_of_your_own(self, tmp_path: Path, unsafe: Mapping[str, Any]) -> None:
        file = tmp_path / "mine.jsonl"
        rows = [
            {"question": "1 + 1?", "answer": 2},
            {"problem": "Half?", "solution": r"so \boxed{\frac{1}{2}}", "split": "train", "id": "half"},
            {"question": "Eggs?", "answer": "She sells 9.\n#### 18"},
        ]
        file.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
        env = PythonMath(file=file, **unsafe)
        assert {split: list(env.tasks(split).ids) for split in env.splits} == {
            "train": ["half"],
            "valid": [],
            "test": ["mine-1", "mine-3"],
        }
        for id, answer in (("mine-1", "2"), ("half", "0.5"), ("mine-3", "18")):
            env.reset(seed=0, options={"task_id": id})
            assert env.step(rf"\boxed{{{answer}}}")[1] == 1.0
        assert env.reset(seed=0)[1]["task_id"] == "half"
        env.close()
        only = tmp_path / "only.jsonl"
        only.write_text(json.dumps(rows[0]))
        env = PythonMath(file=only, **unsafe)
        assert env.reset(seed=0)[1]["task_id"] == "only-1"
        with pytest.raises(UsageError, match="'train' has no tasks"):
            env.reset(options={"split": "train"})
        env.close()
        env = PythonMath(file={"train": file, "valid": str(file)}, **unsafe)
        assert [len(env.tasks(split)) for split in env.splits] == [3, 3, 0]
        assert env.tasks("train").ids[0] == "train-1"

    def test_a_reference_that_the_judge_cannot_read_is_no_score(
        self, tmp_path: Path, unsafe: Mapping[str, Any]
    ) -> None:
        file = tmp_path / "mine.jsonl"
        rows = [{"question": "?", "answer": answer} for answer in ("x>2", "no solution", "größer als")]
        file.write_text("\n".join(map(json.dumps, rows)))
        env = PythonMath(file=file, **unsafe)

        def worth(number_: int, answer: str) -> float:
            env.reset(seed=0, options={"task_id": f"mine-{number_}"})
            return float(env.step(rf"\boxed{{{answer}}}")[1])

        for answer in ("2 < x", "x", "?"):
            with pytest.raises(JudgeFailed, match="'x>2' of the task 'mine-1'") as raised:
                worth(1, answer)
            assert raised.value.hint and raised.value.boundary == "judge"
        assert worth(1, "$x>2$") == 1.0
        # Words have one spelling, and are read by nobody.
        assert worth(2, r"\text{No solution}") == 1.0 and worth(2, "x = 2") == 0.0
        assert worth(3, "Größer als") == 1.0 and worth(3, "x>2") == worth(3, "kleiner als") == 0.0
        env.close()

    @pytest.mark.parametrize(
        "row", ["{", "[]", '{"question": "?"}', '{"question": "?", "answer": "1", "split": "x"}']
    )
    def test_a_file_that_cannot_be_read(self, row: str, tmp_path: Path) -> None:
        file = tmp_path / "mine.jsonl"
        file.write_text(row)
        with pytest.raises(DataUnavailable, match="cannot be read"):
            PythonMath(file=file).tasks("test")

    def test_two_lines_of_one_id_are_refused(self, tmp_path: Path) -> None:
        file = tmp_path / "mine.jsonl"
        row = {"question": "1 + 1?", "answer": 2, "id": "mine-3"}
        file.write_text(f"{json.dumps(row)}\n\n" + json.dumps({**row, "id": None, "split": "train"}))
        with pytest.raises(DataUnavailable, match="lines 1 and 3 have the same id 'mine-3'"):
            PythonMath(file=file).tasks("test")

    def test_wrong_arguments(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="is no file"):
            PythonMath(file=tmp_path / "none.jsonl")
        with pytest.raises(UnknownName, match="dice"):
            PythonMath(kinds=["dise"])
        (tmp_path / "a").write_text("")
        with pytest.raises(UsageError, match="the split 'tset'"):
            PythonMath(file={"tset": tmp_path / "a"})
        with pytest.raises(UsageError, match="exclude"):
            PythonMath(file=tmp_path / "a", kinds="dice")

    def test_kinds(self) -> None:
        env = PythonMath(kinds="dice")
        assert len(env.tasks("test")) == 25 and env.tasks("train")[0].id == "dice-50"


def test_the_id_makes_it() -> None:
    env = agentgym.make("agentgym/PythonMath-v0", kinds=["dice", "heron"])
    assert isinstance(base(env), PythonMath)
    env.close()
