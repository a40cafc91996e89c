"""Task folders of Harbor and Terminal-Bench: what is read of them, and how they are judged."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentgym.actions import write_calls
from agentgym.environments.code.base import Score
from agentgym.environments.code.harbor import TaskFolders
from agentgym.environments.code.harbor_folder import TaskFolder, read_folder
from agentgym.environments.code.harbor_verdict import MOST_SAID, agreed, read_reward, read_summary, summed
from agentgym.errors import AgentGymError, DataUnavailable, UsageError
from agentgym.messages import ToolCall
from agentgym.sandboxes import ExecResult, Sandbox

TEST = """
if [ "$(cat /app/out/greeting.txt)" = "hello" ] && [ ! -e /app/old ]; then r=1; else r=0; fi
echo "$NAME $r" > /logs/verifier/said
echo $r > /logs/verifier/reward.txt
"""
SOLUTION = "mkdir -p out && cp /{}/text out/greeting.txt; rm -f old\n"


def harbor(folder: Path, config: str = "", test: str = TEST, home: str = "tmp/solution") -> Path:
    (folder / "tests").mkdir(parents=True)
    (folder / "solution").mkdir()
    (folder / "task.toml").write_text(f'version = "1.0"\n{config}')
    (folder / "instruction.md").write_text("Write hello.\n")
    (folder / "tests" / "test.sh").write_text(test)
    (folder / "solution" / "solve.sh").write_text(SOLUTION.format(home))
    (folder / "solution" / "text").write_text("hello\n")
    return folder


def old(folder: Path, **config: Any) -> Path:
    (folder / "tests").mkdir(parents=True)
    given = {"instruction": "Write hello.", "difficulty": "easy", "parser_name": "pytest", **config}
    # JSON is YAML.
    (folder / "task.yaml").write_text(json.dumps(given))
    (folder / "Dockerfile").write_text("FROM x AS y\nWORKDIR /srv\nRUN true\nWORKDIR /srv/app\n")
    (folder / "docker-compose.yaml").write_text("services:\n  client:\n    build: .\n")
    (folder / "run-tests.sh").write_text("cat $TEST_DIR/said\n")
    (folder / "tests" / "said").write_text("")
    (folder / "solution.sh").write_text("touch x\n")
    return folder


def call(name: str, **arguments: Any) -> str:
    return write_calls([ToolCall(name, arguments)])


def play(env: TaskFolders, task_id: str, *actions: str) -> tuple[str, float, dict[str, Any]]:
    env.reset(seed=0, options={"task_id": task_id})
    for action in actions:
        observation, reward, terminated, _, info = env.step(action)
    assert terminated
    return observation, reward, info


# What is read -------------------------------------------------------------------------------


def test_a_folder_of_harbor_is_read(tmp_path: Path) -> None:
    config = """
        artifacts = ["/app/out", {source = "/app/log.txt", destination = "log.txt"}]
        [metadata]
        difficulty = "easy"
        [verifier]
        timeout_sec = 12.5
        env = {NAME = "judge"}
        [environment]
        docker_image = "some/image:1"
        cpus = 2
        memory = "4G"
        storage_mb = 512
    """
    (task,) = read_folder(harbor(tmp_path / "set" / "greet", config).parent)
    assert (task.id, task.form, task.instruction) == ("greet", "harbor", "Write hello.")
    assert (task.image, task.context, task.workdir) == ("some/image:1", None, "/app")
    assert (task.seconds, task.cpus, task.memory, task.storage) == (12.5, 2.0, 4096, 512)
    assert task.artifacts == ("/app/out", "/app/log.txt")
    assert task.judging_env == {"NAME": "judge"} and not task.env
    assert task.metadata == {"difficulty": "easy"} and task.lacks == "" and task.needs_image


def test_a_folder_of_terminal_bench_is_read(tmp_path: Path) -> None:
    (task,) = read_folder(old(tmp_path / "greet", max_test_timeout_sec=9))
    assert (task.id, task.form, task.instruction) == ("greet", "terminal-bench", "Write hello.")
    assert (task.context, task.workdir, task.script) == (tmp_path / "greet", "/srv/app", "run-tests.sh")
    assert (task.seconds, task.lacks, task.needs_image) == (9.0, "", True)
    assert task.judging_env == {"TEST_DIR": "/tests"} and task.metadata["difficulty"] == "easy"


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ("[[steps]]\nname = 'a'", "several steps"),
        ("[environment]\ngpus = 1", "a GPU"),
        ("[environment.env]\nKEY = '${SECRET}'", "variables of this machine"),
        ("[verifier.environment]\ndocker_image = 'x'", "an image of its own"),
        ("[environment]\nos = 'windows'", "Linux"),
    ],
)
def test_what_a_task_cannot_have_here_is_told(tmp_path: Path, config: str, why: str) -> None:
    harbor(tmp_path / "bad", config)
    harbor(tmp_path / "good")
    env = TaskFolders(folder=tmp_path, sandbox="bubblewrap")
    assert list(env.left_out) == ["bad"] and why in env.left_out["bad"]
    assert env.tasks("test").ids == ["good"]
    with pytest.raises(UsageError, match=r"no task .* can be used"):
        TaskFolders(folder=tmp_path / "bad", sandbox="bubblewrap")


def test_several_containers_other_parsers_and_other_shells_are_left_out(tmp_path: Path) -> None:
    old(tmp_path / "a", parser_name="swebench")
    old(tmp_path / "b", run_tests_in_same_shell=True)
    two = old(tmp_path / "c") / "docker-compose.yaml"
    two.write_text("services:\n  client: {}\n  server: {}\n")
    assert [task.lacks != "" for task in read_folder(tmp_path)] == [True] * 3


def test_a_task_with_an_image_needs_containers(tmp_path: Path) -> None:
    harbor(tmp_path / "a", "[environment]\ndocker_image = 'x'")
    with pytest.raises(UsageError, match="it needs an image"):
        TaskFolders(folder=tmp_path, sandbox="bubblewrap")


@pytest.mark.parametrize(
    "config",
    [
        "x = ",
        "environment = 3",
        "[verifier]\ntimeout_sec = -1",
        "[verifier]\ntimeout_sec = true",
        "[environment]\nmemory = 'much'",
        "artifacts = ['out']",
        "artifacts = ['/app/../etc']",
        "artifacts = ['/']",
        "artifacts = 'x'",
    ],
)
def test_a_damaged_task_is_refused(tmp_path: Path, config: str) -> None:
    with pytest.raises(DataUnavailable):
        read_folder(harbor(tmp_path / "bad", config))


@given(st.text(max_size=200))
def test_any_configuration_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    for name in ("task.toml", "task.yaml"):
        folder = tmp_path_factory.mktemp("any")
        (folder / name).write_text(text, encoding="utf-8")
        with contextlib.suppress(AgentGymError):
            read_folder(folder)


def test_no_folder_and_no_task_are_refused(tmp_path: Path) -> None:
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "task.toml").write_text("")
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(UsageError):
            read_folder(folder)


def test_an_environment_without_a_folder_says_what_it_needs(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no folder of tasks is given") as missing:
        TaskFolders()
    assert "folder=" in str(missing.value)
    with pytest.raises(UsageError, match="folder is 5"):
        TaskFolders(folder=5)  # type: ignore[arg-type]
    harbor(tmp_path / "greet")
    for name in ("limits", "sandbox_options"):
        with pytest.raises(UsageError, match=rf"{name} is \['x'\]"):
            TaskFolders(folder=tmp_path, **{name: ["x"]})  # type: ignore[arg-type]


# What tests say -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "data", "reward"),
    [
        ("reward.txt", b"1\n", 1.0),
        ("reward.txt", b" 0.25 ", 0.25),
        ("reward.txt", b"", None),
        ("reward.txt", b"nan", None),
        ("reward.txt", b"inf", None),
        ("reward.txt", b"\xff", None),
        ("reward.json", b'{"reward": 0.5, "speed": 3}', 0.5),
        ("reward.json", b'{"speed": 3}', 3.0),
        ("reward.json", b'{"a": 1, "b": 2}', None),
        ("reward.json", b'{"reward": true}', None),
        ("reward.json", b"[1]", None),
        ("reward.json", b"[" * 60_000, None),
        ("reward.json", b'{"reward": 1e999}', None),
        ("reward.json", b'{"reward": ' + b"9" * 400 + b"}", None),
    ],
)
def test_a_reward_is_a_finite_number(name: str, data: bytes, reward: float | None) -> None:
    assert read_reward(data, name) == reward


@given(st.binary(max_size=300), st.sampled_from(["reward.txt", "reward.json"]))
def test_any_bytes_are_a_reward_or_none(data: bytes, name: str) -> None:
    found = read_reward(data, name)
    assert found is None or abs(found) < float("inf")


@pytest.mark.parametrize(
    ("given", "reward", "why"),
    [
        ({}, 0.0, "wrote no reward"),
        ({"reward.txt": 0.5}, 0.5, ""),
        ({"reward.json": 1.0, "reward.txt": 1.0}, 1.0, ""),
        ({"reward.json": 1.0, "reward.txt": 0.0}, 0.0, "do not agree"),
        ({"reward.json": 1.0, "reward.txt": None}, 0.0, "do not agree"),
        ({"reward.json": None, "reward.txt": None}, 0.0, "holds no reward"),
        ({"reward.json": 1e6}, 0.0, "1e+06, and a reward is 0 to 1"),
        ({"reward.txt": -0.5}, 0.0, "-0.5, and a reward is 0 to 1"),
    ],
)
def test_a_reward_is_0_to_1_and_all_files_agree(
    given: dict[str, float | None], reward: float, why: str
) -> None:
    found, said = agreed(given)
    assert found == reward and why in said and bool(said) == bool(why)


def test_one_summary_of_pytest_counts_and_several_are_none() -> None:
    banner = "=== short test summary info ===\n"
    said = f"dots\n{banner}PASSED a::b\nPASSED a::c\n2 passed\n"
    assert read_summary(said) == (2, 2)
    assert read_summary(f"{banner}PASSED a::b\nERROR a::c\nSKIPPED [1] d\n") == (1, 3)
    assert read_summary("PASSED a::b\n") == (0, 0)
    for forged in (f"{banner}PASSED a::b\n", "short test summary info\nPASSED a::b\n"):
        assert read_summary(said + forged) == read_summary(forged + said) == (0, 0)
    assert summed(ExecResult(said + said, "", 0)) == (0.0, "its tests printed several summaries", 0)
    assert summed(ExecResult(said, "", 0)) == (1.0, "", 2)
    # Whoever prints too much would have the true one cut off.
    assert summed(ExecResult(said, "", 0, cut_stdout=1))[:2] == (
        0.0,
        f"its tests printed more than {MOST_SAID >> 20} MiB",
    )
    # What is added to the only one takes no failure away.
    assert read_summary(f"{banner}FAILED a::b\nPASSED a::b\n") == (1, 2)


# How it is judged ---------------------------------------------------------------------------


class Looking(TaskFolders):
    """Looks around where it was judged, a moment later."""

    seen = ""

    async def _verdict(self, sandbox: Sandbox, task: TaskFolder) -> Score:
        score = await super()._verdict(sandbox, task)
        look = "sleep 1; cat /proc/[0-9]*/cmdline | tr '\\0' ' '; echo; cat /logs/verifier/*"
        self.seen = (await sandbox.exec(look)).stdout
        return score


@pytest.mark.bubblewrap
class TestWithoutAnImage:
    def test_the_solution_is_right_and_nothing_is_wrong(self, tmp_path: Path) -> None:
        env = TaskFolders(folder=harbor(tmp_path / "greet"), sandbox="bubblewrap")
        (task,) = env.tasks("test")
        expert = env.expert(task)
        assert expert is not None
        observation, info = env.reset(seed=0)
        assert observation.startswith("Write hello.") and info["task_id"] == "greet"
        _, reward, info = play(env, "greet", *expert)
        assert (reward, info["success"], info["why"]) == (1.0, True, "")
        _, reward, info = play(env, "greet", *env.nop(task))
        assert (reward, info["success"]) == (0.0, False)
        env.close()

    def test_rewards_and_tests_that_a_policy_makes_do_not_count(self, tmp_path: Path) -> None:
        env = TaskFolders(folder=harbor(tmp_path / "greet"), sandbox="bubblewrap")
        cheat = (
            "ls /tests; mkdir -p /logs/verifier; echo 1 > /logs/verifier/reward.txt; echo 1 > reward.txt; "
            "mkdir -p logs/verifier tests; echo 1 > logs/verifier/reward.txt; echo 'echo 1' > tests/test.sh; "
            "(while :; do echo 1 > /tmp/logs/verifier/reward.txt; done) &"
        )
        _, reward, _ = play(env, "greet", call("bash", command=cheat), call("submit"))
        assert reward == 0.0
        env.close()

    @pytest.mark.parametrize(
        ("test", "why"),
        [
            ("true\n", "wrote no reward"),
            ("sleep 60\n", "did not end"),
            ("echo much > /logs/verifier/reward.txt\n", "holds no reward"),
            ("ln -s /etc/passwd /logs/verifier/reward.json\n", "holds no reward"),
        ],
    )
    def test_tests_that_say_nothing_give_nothing(self, tmp_path: Path, test: str, why: str) -> None:
        folder = harbor(tmp_path / "greet", "[verifier]\ntimeout_sec = 1", test)
        env = TaskFolders(folder=folder, sandbox="bubblewrap")
        _, reward, info = play(env, "greet", call("submit"))
        assert reward == 0.0 and why in info["why"]
        env.close()

    @pytest.mark.parametrize(
        ("code", "why"),
        [
            ("open('/logs/verifier/reward.json', 'w').write('{\"reward\": 1}')", "do not agree"),
            ("open('/logs/verifier/reward.json', 'w').write('{\"reward\": 1000000}')", "do not agree"),
            ("import os; os.kill(os.getsid(0), 9)", "was ended by"),
        ],
    )
    def test_what_code_under_test_writes_beside_the_reward_does_not_count(
        self, tmp_path: Path, code: str, why: str
    ) -> None:
        test = "python3 -c 'import it' && r=1 || r=0; echo 0 > /logs/verifier/reward.txt\n"
        env = TaskFolders(folder=harbor(tmp_path / "greet", test=test), sandbox="bubblewrap")
        write = call("edit", command="create", path="it.py", text=code + "\n")
        _, reward, info = play(env, "greet", write, call("submit"))
        assert reward == 0.0 and why in info["why"]
        env.close()

    def test_nothing_runs_any_more_when_the_reward_is_read(self, tmp_path: Path) -> None:
        later = "(while kill -0 $$; do :; done; sleep 0.5; echo 1 > reward.txt) 2> /dev/null &"
        test = f"cd /logs/verifier\nsetsid sleep 300 &\n{later}\necho 0 > reward.txt\n"
        env = Looking(folder=harbor(tmp_path / "greet", test=test), sandbox="bubblewrap")
        _, reward, info = play(env, "greet", call("submit"))
        assert (reward, info["why"], info["left_running"]) == (0.0, "", True)
        assert env.seen.split()[-1] == "0" and "setsid" not in env.seen and "sleep 300" not in env.seen
        env.close()

    def test_what_is_too_much_is_scored(self, tmp_path: Path) -> None:
        folder = harbor(tmp_path / "greet", 'artifacts = ["/app/out", "/app/none"]')
        env = TaskFolders(folder=folder, sandbox="bubblewrap")
        large = call("bash", command="mkdir out; truncate -s 200M out/greeting.txt")
        _, reward, info = play(env, "greet", large, call("submit"))
        assert reward == 0.0 and "cannot be copied" in info["why"]
        _, reward, _ = play(
            env, "greet", call("bash", command="mkdir out; echo hello > out/greeting.txt"), call("submit")
        )
        assert reward == 1.0
        env.close()


@pytest.mark.docker
class TestWithAnImage:
    def test_a_dockerfile_is_built_only_on_demand(self, tmp_path: Path) -> None:
        from agentgym.sandboxes.daemon import Daemon
        from agentgym.sandboxes.images import build

        folder = harbor(tmp_path / "greet", home="solution")
        (folder / "environment").mkdir()
        text = f"FROM {build.tag()}\nUSER 0\nWORKDIR /app\nCOPY old /app/old\n"
        (folder / "environment" / "Dockerfile").write_text(text)
        (folder / "environment" / "old").write_text(f"old {tmp_path}\n")
        env = TaskFolders(folder=folder)
        with pytest.raises(UsageError, match="somebody's program"):
            env.reset(seed=0)
        env.close()
        env = TaskFolders(folder=folder, build=True)
        (task,) = env.tasks("test")
        expert = env.expert(task)
        assert expert is not None
        try:
            assert play(env, "greet", *expert)[1] == 1.0
            # The image brings a file that the task wants gone.
            half = call("bash", command="cat old; mkdir out; echo hello > out/greeting.txt")
            assert play(env, "greet", half, call("submit"))[1] == 0.0
        finally:
            name = env.sandbox_spec(task).image
            env.close()
            with contextlib.closing(Daemon(os.environ["DOCKER_HOST"])) as daemon:
                daemon.do(lambda client: client.remove_image(name))

    def test_the_image_is_the_task_s_and_fresh_when_it_is_judged(self, tmp_path: Path) -> None:
        from agentgym.sandboxes.images import build

        folder = harbor(tmp_path / "greet", f'[environment]\ndocker_image = "{build.tag()}"', home="solution")
        env = TaskFolders(folder=folder)
        (task,) = env.tasks("test")
        expert = env.expert(task)
        assert expert is not None
        assert play(env, "greet", *expert)[1] == 1.0
        assert play(env, "greet", *env.nop(task))[1] == 0.0
        cheat = (
            "mkdir -p /tests /logs/verifier; echo 1 > /logs/verifier/reward.txt; ls -la /tests; "
            "printf '#!/bin/sh\\necho 1 > /logs/verifier/reward.txt\\n' > /usr/local/bin/cat; "
            "chmod 755 /usr/local/bin/cat"
        )
        assert play(env, "greet", call("bash", command=cheat), call("submit"))[1] == 0.0
        env.close()

    def test_terminal_bench_is_judged_by_pytest_s_summary(self, tmp_path: Path) -> None:
        from agentgym.sandboxes.images import build

        folder = old(tmp_path / "greet")
        (folder / "run-tests.sh").write_text(
            "echo '== short test summary info =='\n"
            "if [ -e x ]; then echo 'PASSED a::b'; else echo 'FAILED a::b'; fi\ncat $TEST_DIR/said\n"
        )
        env = TaskFolders(folder=folder, image=build.tag())
        (task,) = env.tasks("test")
        expert = env.expert(task)
        assert expert is not None
        assert play(env, "greet", *expert)[1] == 1.0
        _, reward, info = play(env, "greet", *env.nop(task))
        assert (reward, info["why"]) == (0.0, "a test failed")
        env.close()
