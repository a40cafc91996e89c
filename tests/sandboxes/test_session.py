from __future__ import annotations

import asyncio
import codecs
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentgym.errors import UsageError
from agentgym.sandboxes import Sandbox, SandboxEnded, SandboxSpec, make_backend, session
from agentgym.sandboxes.session import Answer, Kept, PythonSession, Session, ShellSession

T = TypeVar("T")
Play = Callable[[Callable[[Sandbox], Awaitable[T]]], T]


@asynccontextmanager
async def started(backend: str) -> AsyncIterator[Sandbox]:
    made = make_backend(backend, **({"unsafe": True} if backend == "process" else {}))
    try:
        async with await made.start(SandboxSpec()) as sandbox:
            yield sandbox
    finally:
        await made.aclose()


@pytest.fixture(
    params=[
        "process",
        pytest.param("bubblewrap", marks=pytest.mark.bubblewrap),
        pytest.param("docker", marks=pytest.mark.docker),
    ],
    name="play",
    scope="module",
)
def _play(request: pytest.FixtureRequest) -> Iterator[Play[Any]]:
    """Runs a coroutine with a sandbox of its own."""

    def run(body: Callable[[Sandbox], Awaitable[T]]) -> T:
        async def main() -> T:
            async with started(request.param) as sandbox:
                return await body(sandbox)

        return asyncio.run(main())

    yield run


def answers(
    play: Play[list[Answer]], kind: type[Session], *commands: str, seconds: float = 60
) -> list[Answer]:
    async def body(sandbox: Sandbox) -> list[Answer]:
        opened = kind(sandbox)
        return [await opened.run(command, seconds=seconds) for command in commands]

    return play(body)


def overdue(
    play: Play[list[Answer]],
    kind: type[Session],
    forward: Callable[[float], None],
    *commands: str,
    patience: Mapping[int, float],
) -> list[Answer]:
    """Answers, where the deadlines of some pass as soon as the command has made a file ``begun``.

    Args:
        patience: By the number of such a command, the patience of its session.
    """

    async def body(sandbox: Sandbox) -> list[Answer]:
        opened, told = kind(sandbox), []
        for number, command in enumerate(commands):
            running = asyncio.create_task(opened.run(command, seconds=600))
            if number in patience:
                assert (await sandbox.exec(f"{waiting('begun')}; rm begun", seconds=60)).ok
                with pytest.MonkeyPatch.context() as patched:
                    patched.setattr(session, "PATIENCE", patience[number])
                    forward(1000)
                    await running
            told.append(await running)
        return told

    return play(body)


def waiting(name: str) -> str:
    """A command that waits for a file."""
    return f"until test -e {name}; do sleep 0.05; done"


def outputs(play: Play[Any], kind: type[Session], *commands: str) -> list[str]:
    return [answer.output for answer in answers(play, kind, *commands)]


class TestShell:
    def test_state_goes_on(self, play: Play[Any]) -> None:
        told = answers(
            play,
            ShellSession,
            "mkdir -p deep/er; cd deep/er; X=3; f() { echo f$X; }; set -- a b",
            "f; basename $PWD; echo $#",
            "export Y=é; sh -c 'echo $Y'",
            "cat <<E\n$X 'q'\nE",
        )
        assert [answer.output for answer in told] == ["", "f3\ner\n2\n", "é\n", "3 'q'\n"]
        assert all(answer.ok for answer in told)

    def test_both_streams_come_in_order_and_the_status_is_told(self, play: Play[Any]) -> None:
        (told,) = answers(play, ShellSession, "echo a; echo b >&2; printf c; (exit 7)")
        assert told == Answer("a\nb\nc", 7)
        assert not told.ok

    def test_commands_read_nothing(self, play: Play[Any]) -> None:
        assert outputs(play, ShellSession, "cat; read x || echo none", "echo next") == ["none\n", "next\n"]

    def test_a_descriptor_that_a_command_redirects_is_back_for_the_next(self, play: Play[Any]) -> None:
        told = outputs(
            play, ShellSession, "exec >/dev/null 2>&1; exec 254>&-", "echo here; exec <&-", "echo on"
        )
        assert told == ["", "here\n", "on\n"]

    @pytest.mark.parametrize(
        ("command", "words"),
        [
            ("echo last; exit 4", "the shell ended with status 4"),
            ("exec true", "the shell ended with status 0"),
            ("kill -9 $$; sleep 5", "the shell was killed by SIGKILL"),
            ("set -e; false; echo no", "the shell ended with status 1"),
        ],
    )
    def test_what_ends_the_shell_is_told_and_a_new_one_starts(
        self, play: Play[Any], command: str, words: str
    ) -> None:
        kept, ended, fresh = answers(play, ShellSession, "X=kept", command, "echo .$X")
        assert (kept.lost, ended.lost, ended.status, ended.ok) == ("", words, None, False)
        assert ended.output == ("last\n" if "last" in command else "")
        assert fresh == Answer(".\n", 0)

    def test_one_that_was_killed_between_commands(self, play: Play[Any]) -> None:
        async def body(sandbox: Sandbox) -> Answer:
            shell = ShellSession(sandbox)
            await shell.run("echo $$ > pid; X=3", seconds=60)
            await sandbox.exec("p=$(cat pid); kill -9 $p; while kill -0 $p; do sleep 0.05; done", seconds=60)
            return await shell.run("echo .$X", seconds=60)

        told = play(body)
        assert told.ok
        assert told.output == (
            "[the shell was killed by SIGKILL since the last command: its state is lost, and this is a new "
            "one]\n.\n"
        )

    @pytest.mark.parametrize(
        "command",
        [
            "sleep 60; echo not",
            "while :; do sleep 60; done; echo not",
            "while :; do :; done",
            "sleep 60 | cat\necho not",
            "f() { sleep 60; }; f; f",
        ],
    )
    def test_a_command_over_its_deadline_is_interrupted_and_the_state_is_kept(
        self, play: Play[Any], command: str, forward: Callable[[float], None]
    ) -> None:
        commands = "X=kept", f"echo said; touch begun; {command}", "echo $X"
        _, late, after = overdue(play, ShellSession, forward, *commands, patience={1: 2})
        assert (late.timed_out, late.lost, late.ok) == (True, "", False)
        assert late.output == "said\n"
        assert after == Answer("kept\n", 0)

    def test_one_that_does_not_stop_is_killed(
        self, play: Play[Any], forward: Callable[[float], None]
    ) -> None:
        command = "trap '' INT; X=3; echo said; touch begun; while :; do :; done"
        late, after = overdue(play, ShellSession, forward, command, "echo .$X", patience={0: 0.1})
        assert late == Answer("said\n", None, timed_out=True, lost="the shell did not stop and was killed")
        assert after == Answer(".\n", 0)

    def test_a_flood_is_cut_and_counted(self, play: Play[Any], forward: Callable[[float], None]) -> None:
        commands = "seq 1 400000; echo end", "seq 1 400000; touch begun; yes", "echo on"
        flood, forever, after = overdue(play, ShellSession, forward, *commands, patience={1: 10})
        size = sum(len(f"{n}\n") for n in range(1, 400_001)) + 4
        assert flood.status == 0
        assert flood.output.startswith("1\n2\n3\n")
        assert flood.output.endswith("\n400000\nend\n")
        assert flood.cut == size - session.LIMIT
        assert f"\n… [{flood.cut} characters left out] …\n" in flood.output
        assert forever.timed_out
        assert forever.cut > 0
        assert after == Answer("on\n", 0)

    def test_a_mark_that_was_seen_is_no_use(self, play: Play[Any]) -> None:
        # The shell's command line is where the first mark stands; each command has another.
        seen = "tr '\\0' '\\n' </proc/$$/cmdline; printf '\\n%032d 0\\n' 0; echo real"
        (told,) = answers(play, ShellSession, seen)
        assert told.status == 0
        assert told.output.endswith(f"\n{'0' * 32} 0\nreal\n")

    def test_the_background_goes_on(self, play: Play[Any]) -> None:
        async def body(sandbox: Sandbox) -> list[str]:
            shell = ShellSession(sandbox)
            first = await shell.run(f"({waiting('go')}; echo later; touch told) & echo now", seconds=60)
            await sandbox.write("go", b"")
            await sandbox.exec(waiting("told"), seconds=60)
            return [first.output, (await shell.run("echo then", seconds=60)).output]

        assert play(body) == ["now\n", "later\nthen\n"]


class TestPython:
    def test_names_go_on_and_the_last_value_is_shown(self, play: Play[Any]) -> None:
        told = outputs(
            play,
            PythonSession,
            "import math\nx = [1, 'é']",
            "x",
            "_ * 2",
            "None",
            "print(1); math.pi; x[0] + 1",
        )
        assert told == ["", "[1, 'é']\n", "[1, 'é', 1, 'é']\n", "", "1\n2\n"]

    def test_tracebacks_show_the_cells_alone(self, play: Play[Any]) -> None:
        told = answers(
            play, PythonSession, "def f():\n    return 1 / 0\n", "f()", "x y", "import json\njson.loads('')"
        )
        assert [answer.status for answer in told] == [0, 1, 1, 1]
        lines = told[1].output.splitlines()
        assert lines[0] == "Traceback (most recent call last):"
        assert [line for line in lines if line.startswith("  File")] == [
            '  File "<cell 2>", line 1, in <module>',
            '  File "<cell 1>", line 2, in f',
        ]
        assert lines[-1] == "ZeroDivisionError: division by zero"
        assert "return 1 / 0" in told[1].output
        assert told[2].output.startswith('  File "<cell 3>", line 1\n    x y\n')
        assert "SyntaxError" in told[2].output
        assert 'File "<cell 4>", line 2' in told[3].output
        assert not any("interpreter.py" in answer.output or "<string>" in answer.output for answer in told)

    def test_output_is_taken_at_the_descriptors(self, play: Play[Any]) -> None:
        code = (
            "import os, subprocess, sys\nprint('a')\nos.write(1, b'b\\n')\nprint('c', file=sys.stderr)\n"
            "_ = subprocess.run(['sh', '-c', 'echo d; echo e >&2; cat'])"
        )
        assert outputs(play, PythonSession, code) == ["a\nb\nc\nd\ne\n"]

    def test_whatever_a_cell_does_to_its_streams_the_next_one_has_them(self, play: Play[Any]) -> None:
        told = outputs(
            play,
            PythonSession,
            "import os, sys\nos.close(1); sys.stdout.close(); os.close(0); sys.stderr = None",
            "print('here')\nprint('there', file=sys.stderr)",
            "input()",
        )
        assert told[:2] == ["", "here\nthere\n"]
        assert "EOFError" in told[2]

    @pytest.mark.parametrize(
        ("code", "words"),
        [
            ("import os\nprint('last')\nos._exit(3)", "the interpreter ended with status 3"),
            ("print('last')\nimport ctypes\nctypes.string_at(0)", "the interpreter was killed by SIGSEGV"),
            ("import os\nprint('last')\nos.kill(os.getpid(), 9)", "the interpreter was killed by SIGKILL"),
        ],
    )
    def test_one_that_dies_is_told_and_a_new_one_starts(self, play: Play[Any], code: str, words: str) -> None:
        _, died, fresh = answers(play, PythonSession, "x = 1", code, "'x' in globals()")
        assert died == Answer("last\n", None, lost=words)
        assert fresh == Answer("False\n", 0)

    def test_memory_is_bounded_and_running_out_of_it_is_an_answer(self, play: Play[Any]) -> None:
        first, second = answers(play, PythonSession, "b = bytearray(4 << 30)", "1 + 1")
        assert "MemoryError" in first.output or "SIGKILL" in first.lost
        assert second == Answer("2\n", 0)

    def test_leaving_is_no_end(self, play: Play[Any]) -> None:
        told = answers(play, PythonSession, "x = 1\nexit(3)", "x")
        assert told[0].output.endswith("SystemExit: 3\n")
        assert told[1] == Answer("1\n", 0)

    def test_a_child_that_a_cell_forks_does_not_speak_for_it(self, play: Play[Any]) -> None:
        code = "import os\nif os.fork():\n    os.wait()\n    print('parent')"
        assert outputs(play, PythonSession, code, "1 + 1") == ["parent\n", "2\n"]

    def test_a_cell_over_its_deadline_is_interrupted(
        self, play: Play[Any], forward: Callable[[float], None]
    ) -> None:
        setup = "import time\nx = 1\ndef begin():\n    open('begun', 'w').close()\n    time.sleep(60)"
        stubborn = "while True:\n    try:\n        begin()\n    except KeyboardInterrupt:\n        pass"
        cells = setup, "begin()", "x", stubborn, "'x' in globals()"
        told = overdue(play, PythonSession, forward, *cells, patience={1: 10, 3: 0.2})
        assert (told[1].timed_out, told[1].lost) == (True, "")
        assert told[1].output.endswith("KeyboardInterrupt\n")
        assert told[2] == Answer("1\n", 0)
        assert told[3] == Answer("", None, timed_out=True, lost="the interpreter did not stop and was killed")
        assert told[4] == Answer("False\n", 0)

    def test_files_of_the_working_directory_are_modules_and_shadow_nothing_of_ours(
        self, play: Play[Any]
    ) -> None:
        async def body(sandbox: Sandbox) -> Answer:
            await sandbox.write("traceback.py", "raise SystemExit('shadowed')")
            await sandbox.write("mine.py", "answer = 42")
            return await PythonSession(sandbox).run("import mine\nmine.answer", seconds=60)

        assert play(body) == Answer("42\n", 0)

    def test_pickles_of_a_cells_classes(self, play: Play[Any]) -> None:
        code = "import pickle\nclass A:\n    pass\ntype(pickle.loads(pickle.dumps(A()))) is A, __name__"
        assert outputs(play, PythonSession, code) == ["(True, '__main__')\n"]


@pytest.mark.parametrize("kind", [ShellSession, PythonSession])
class TestEither:
    def test_commands_wait_for_each_other(self, play: Play[Any], kind: type[Session]) -> None:
        async def body(sandbox: Sandbox) -> list[Answer]:
            opened = kind(sandbox)
            return await asyncio.gather(*(opened.run(f"print({n})", seconds=60) for n in range(3)))

        told = play(body)
        assert [answer.status for answer in told] == ([0, 0, 0] if kind is PythonSession else [2, 2, 2])

    def test_one_that_was_cancelled_leaves_no_answer_behind(
        self, play: Play[Any], kind: type[Session]
    ) -> None:
        slow = "sleep 60" if kind is ShellSession else "import time; time.sleep(60)"

        async def body(sandbox: Sandbox) -> Answer:
            opened = kind(sandbox)
            await opened.run("x=1", seconds=60)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.3):
                    await opened.run(slow, seconds=100)
            return await opened.run("true" if kind is ShellSession else "None", seconds=60)

        assert play(body) == Answer("", 0)

    def test_what_cannot_be_run(self, play: Play[Any], kind: type[Session]) -> None:
        async def body(sandbox: Sandbox) -> None:
            opened = kind(sandbox)
            for command, words in ((" \n", "nothing"), ("x" * 200_001, "200001"), ("a\0b", "NUL")):
                with pytest.raises(UsageError, match=words):
                    await opened.run(command, seconds=1)
            with pytest.raises(UsageError, match="deadline"):
                await opened.run("1", seconds=0)
            with pytest.raises(UsageError, match="limit"):
                kind(sandbox, limit=1)

        play(body)

    def test_a_sandbox_that_was_ended_says_so(self, kind: type[Session]) -> None:
        # The worker is the parent of what runs; as the first process of a namespace it could not be killed.
        kill = "kill -9 $PPID; sleep 9" if kind is ShellSession else "import os\nos.kill(os.getppid(), 9)\n"

        async def body(sandbox: Sandbox) -> str:
            opened = kind(sandbox)
            for _ in range(2):
                with pytest.raises(SandboxEnded):
                    await opened.run(kill if kind is ShellSession else kill + "while 1: pass", seconds=60)
            return sandbox.ended

        async def main() -> str:
            async with started("process") as sandbox:
                return await body(sandbox)

        assert asyncio.run(main())

    def test_one_whose_sandbox_was_restored_begins_anew(self, play: Play[Any], kind: type[Session]) -> None:
        async def body(sandbox: Sandbox) -> tuple[Answer, str]:
            opened, other = kind(sandbox), ShellSession(sandbox)
            await opened.run("X=1", seconds=60)
            kept = await sandbox.snapshot()
            await sandbox.restore(kept)
            # Another command of the restored sandbox, which has the number that the old interpreter had.
            running = asyncio.create_task(other.run("sleep 1; echo undisturbed", seconds=60))
            await asyncio.sleep(0.3)
            told = await opened.run("echo .$X" if kind is ShellSession else "'X' in globals()", seconds=60)
            return told, (await running).output

        told, beside = play(body)
        assert told.ok
        assert told.output.startswith(f"[{kind.what} was killed by SIGKILL since the last command")
        assert told.output.endswith("]\n.\n" if kind is ShellSession else "]\nFalse\n")
        assert beside == "undisturbed\n"

    def test_closing_ends_it(self, play: Play[Any], kind: type[Session]) -> None:
        async def body(sandbox: Sandbox) -> list[int | None]:
            opened = kind(sandbox)
            await opened.run("X=1", seconds=60)
            await opened.close()
            return [(await opened.run("true" if kind is ShellSession else "1", seconds=60)).status]

        assert play(body) == [0]


@given(st.text(max_size=400), st.integers(2, 60), st.lists(st.integers(1, 9), max_size=50))
def test_what_is_kept_is_the_beginning_and_the_end(text: str, limit: int, cuts: list[int]) -> None:
    data, kept = text.encode("utf-8", "replace"), Kept(limit)
    for size in cuts:
        kept.add(data[:size])
        data = data[size:]
    kept.add(data)
    text = text.encode("utf-8", "replace").decode()
    assert kept.cut == max(0, len(text) - limit)
    if kept.cut:
        head, tail = text[: limit // 2], text[len(text) - (limit - limit // 2) :]
        assert kept.text == f"{head}\n… [{kept.cut} characters left out] …\n{tail}"
    else:
        assert kept.text == text


@given(st.binary(max_size=80), st.integers(1, 7), st.integers(0, 300), st.binary(max_size=9))
def test_a_mark_is_found_however_the_bytes_come(before: bytes, size: int, status: int, after: bytes) -> None:
    mark = b"\n0123456789abcdef0123456789abcdef "
    data, kept = before + mark + b"%d\n" % status + after, Kept(10_000)
    found = None
    while data and found is None:
        found = kept.scan(data[:size], mark)
        data = data[size:]
    assert found == status
    kept.add(data)
    # Half a character at the end waits for its other half.
    assert kept.text == codecs.getincrementaldecoder("utf-8")("replace").decode(before + after)


@pytest.mark.parametrize("told", [b"x\n", b"\n", b"12345678901234567890\n", b"-1\n"])
def test_a_status_that_is_none(told: bytes) -> None:
    kept = Kept(100)
    assert kept.scan(b"\nm " + told, b"\nm ") == 255
