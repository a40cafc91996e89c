"""Repository repair: what instances are, and that nothing but a repair is rewarded."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import agentgym
from agentgym.actions import write_calls
from agentgym.environments.code import repair_build, repair_images
from agentgym.environments.code.repair import Repair
from agentgym.environments.code.repair_archives import Index
from agentgym.environments.code.repair_instances import SWE_GYM, Instance, load
from agentgym.environments.code.repair_recipes import Recipe, Recipes, recipes
from agentgym.errors import DataUnavailable, EnvironmentFailed, MissingData, UsageError
from agentgym.messages import ToolCall
from agentgym.sandboxes import make_backend

QUICK = ("texttable-1.7.1", "webcolors-24.8.0")


def bash(command: str) -> str:
    return write_calls([ToolCall("bash", {"command": command})])


SUBMIT = write_calls([ToolCall("submit", {})])


@pytest.fixture(scope="module")
def data(repair_data: Callable[..., Path]) -> Path:
    """Two instances, built of what the package index has."""
    return repair_data(*QUICK)


@pytest.fixture
def env(data: Path) -> Iterator[Repair]:
    made = Repair(data=data)
    yield made
    made.close()


def play(env: Repair, task_id: str, *actions: str) -> tuple[float, dict[str, Any]]:
    """Play to the end; the last reward and info."""
    env.reset(seed=0, options={"task_id": task_id})
    for action in actions:
        _, reward, terminated, _, info = env.step(action)
        if terminated:
            return reward, info
    raise AssertionError("the episode goes on")


# Recipes ------------------------------------------------------------------------------------


def test_recipes_are_whole() -> None:
    made = recipes()
    assert len(made.recipes) >= 25
    assert len({recipe.package for recipe in made.recipes}) >= 15
    assert len({recipe.id for recipe in made.recipes}) == len(made.recipes)
    for recipe in made.recipes:
        assert recipe.licence and recipe.python and recipe.sources and recipe.tests
        assert recipe.old.version != recipe.new.version and recipe.old.sha256 != recipe.new.sha256
        assert 1 <= len(recipe.fail_to_pass) <= repair_build.MOST
        assert recipe.pass_to_pass.count >= repair_build.LEAST
        assert set(recipe.libraries) <= made.libraries.keys()
        assert recipe.package not in {made.libraries[name].package for name in recipe.libraries}
        assert 150 <= len(recipe.statement) <= 2_000 and "\n" not in recipe.statement
        # No name of a hidden test stands in what the policy reads.
        names = {name.rpartition("::")[2].partition("[")[0] for name in recipe.fail_to_pass}
        assert not [name for name in names if name in recipe.statement]
    for library in made.libraries.values():
        assert library.licence and library.file.endswith("-none-any.whl")
    splits = [repair_build.split_of(recipe.package) for recipe in made.recipes]
    assert min(splits.count(split) for split in Repair.splits) >= 10
    assert splits.count(Repair.default_split) == agentgym.families()["agentgym/Repair-v0"].episodes


# What is protected, and other people's records ----------------------------------------------


def instance(**more: Any) -> Instance:
    given = {"test_patch": "diff --git a/checks/one.py b/checks/one.py\n", **more}
    return Instance("i", "r", "1", "s", "p", fail_to_pass=(), pass_to_pass=(), **given)


@pytest.mark.parametrize(
    "path",
    [
        "tests/test_a.py", "src/pkg/tests/data.txt", "test_a.py", "pkg/a_test.py", "conftest.py",
        "pkg/conftest.py", "sitecustomize.py", "src/usercustomize.py", "pytest.ini", "setup.cfg", "tox.ini",
        "pyproject.toml", "x.pth", "src/evil.pth", "pkg/__pycache__/a.pyc", "pkg/a.pyc", ".gitattributes",
        "pkg.egg-info/entry_points.txt", "checks/one.py", "checks", "spec/deep/it.py",
    ],
)  # fmt: skip
def test_tests_and_what_configures_them_are_protected(path: str) -> None:
    assert instance(tests=("spec",)).protected(path)


@pytest.mark.parametrize(
    "path", ["pkg/a.py", "src/pkg/testing.py", "pkg/latest.py", "README.md", "specs/it.py"]
)
def test_sources_are_not_protected(path: str) -> None:
    assert not instance(tests=("spec",)).protected(path)


RECORD = {
    "instance_id": "Owner__name-1",
    "repo": "owner/name",
    "base_commit": "0" * 40,
    "patch": "p",
    "test_patch": "t",
    "problem_statement": "It is broken.",
    "FAIL_TO_PASS": '["tests/test_a.py::test_b[x y]"]',
    "PASS_TO_PASS": ["tests/test_a.py::test_c"],
    "version": "3.1",
}


def test_records_of_swe_bench_and_swe_gym_are_read(tmp_path: Path) -> None:
    place = tmp_path / "records.json"
    place.write_text(json.dumps([RECORD, {**RECORD, "instance_id": "o__n-2", "image_name": "mine:1"}]))
    first, second = load(place)
    assert (first.repo, first.version, first.base_commit) == ("owner/name", "3.1", "0" * 40)
    assert first.fail_to_pass == ("tests/test_a.py::test_b[x y]",)
    assert first.pass_to_pass == ("tests/test_a.py::test_c",)
    assert first.test_files == ("tests/test_a.py",)
    assert first.image == "swebench/sweb.eval.x86_64.owner_1776_name-1:latest"
    assert second.image == "mine:1"
    lines = tmp_path / "records.jsonl"
    lines.write_text(f"{json.dumps(RECORD)}\n\n")
    assert load(lines, images=SWE_GYM)[0].image == "xingyaoww/sweb.eval.x86_64.owner_s_name-1:latest"
    env = Repair(data=lines)
    assert env.tasks("test").ids == ["Owner__name-1"] and len(env.tasks("train")) == 0
    task = env.find_task("Owner__name-1")
    assert "patch" not in task.metadata and task.private["patch"] == "p"
    env.close()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"patch": None}, None),
        ({"FAIL_TO_PASS": "no list"}, "no instance"),
        ({"FAIL_TO_PASS": {"a": 1}}, "no instance"),
        ({"FAIL_TO_PASS": ["test_b (a.tests.B)"]}, "not named as pytest names them"),
        ({"agentgym": {}}, "no instance"),
        ({"agentgym": {"libraries": []}, "instance_id": "../../etc"}, "cannot name a folder"),
        ({"agentgym": {"libraries": []}, "instance_id": ".."}, "cannot name a folder"),
        ({"agentgym": {"libraries": ["../../.ssh"]}}, "cannot name a folder"),
    ],
)
def test_what_is_no_record_is_refused(tmp_path: Path, change: dict[str, Any], said: str | None) -> None:
    place = tmp_path / "records.jsonl"
    record = {**RECORD, **change}
    if said is None:
        del record["patch"]
        said = "patch"
    place.write_text(json.dumps(record))
    with pytest.raises(UsageError, match=said):
        load(place)


def test_wrong_arguments_are_refused(tmp_path: Path) -> None:
    place = tmp_path / "records.jsonl"
    place.write_text(json.dumps(RECORD))
    with pytest.raises(UsageError, match="cannot name images"):
        load(place, images="mine/{name}")
    with pytest.raises(UsageError, match="test_seconds is 0"):
        Repair(data=place, test_seconds=0)


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    place = tmp_path / "records.jsonl"
    for text in ("{", "[1"):
        place.write_text(text)
        with pytest.raises(DataUnavailable, match="cannot be read"):
            load(place)
    with pytest.raises(DataUnavailable, match="cannot be read"):
        load(tmp_path / "nothing")


def test_a_dockerfile_is_built_only_for_one_who_says_so(tmp_path: Path) -> None:
    place = tmp_path / "records.jsonl"
    place.write_text(json.dumps({**RECORD, "dockerfile": "FROM scratch\n"}))
    env = Repair(data=place)
    with pytest.raises(UsageError, match="brings a Dockerfile"):
        env.reset(options={"task_id": "Owner__name-1", "split": "test"})
    env.close()
    with pytest.raises(UsageError, match="has no Dockerfile"):
        asyncio.run(repair_images.build(instance(), allowed=True))


# Episodes -----------------------------------------------------------------------------------


@pytest.mark.bubblewrap
@pytest.mark.parametrize("task_id", QUICK)
def test_the_change_of_the_next_release_is_rewarded_and_nothing_is_not(env: Repair, task_id: str) -> None:
    task = env.find_task(task_id)
    reward, info = play(env, task_id, *env.expert(task))
    assert (reward, info["success"], info["why"]) == (1.0, True, "")
    assert info["fail_to_pass"] == info["pass_to_pass"] == 1.0 and info["patch"].startswith("diff --git")
    reward, info = play(env, task_id, *env.nop(task))
    assert (reward, info["success"], info["why"]) == (0.0, False, "nothing was changed")


@pytest.mark.bubblewrap
def test_the_policy_sees_the_problem_and_nothing_of_the_solution(env: Repair) -> None:
    observation, info = env.reset(seed=0, options={"task_id": "texttable-1.7.1"})
    task = env.task
    assert task.instruction in observation
    assert [tool["function"]["name"] for tool in info["tools"]] == ["bash", "edit", "submit"]
    told, *_ = env.step(bash("git log --oneline | wc -l; git status --short | wc -l; ls -a; env"))
    assert told.split()[:2] == ["1", "0"]
    told, *_ = env.step(bash("python3 -m pytest -q tests.py 2>&1 | tail -1"))
    assert "passed" in told
    places = "/work /tmp /etc /var /opt /home"
    told, *_ = env.step(bash(f"grep -rl test_add_rows_iterator {places}; find {places} -name '*.patch'"))
    assert "/test" not in told and ".patch" not in told
    assert "1.7.1" not in env.step(bash("git show --stat HEAD; cat texttable.py"))[0]


@pytest.mark.bubblewrap
def test_the_last_turn_hands_in_what_is_there(data: Path) -> None:
    env = Repair(data=data, max_steps=2)
    env.reset(seed=0, options={"task_id": "webcolors-24.8.0"})
    apply, submit = env.expert(env.task)[:-1], env.expert(env.task)[-1]
    assert submit == SUBMIT and len(apply) == 2
    env.step(apply[0])
    _, reward, terminated, truncated, info = env.step(apply[1])
    assert (reward, terminated, truncated, info["success"]) == (1.0, False, True, True)
    env.close()


FORGE = r"""
import json, os
for fd in range(3, 40):
    try:
        for name in ("tests.py::test_add_rows_header_only_iterator", "tests.py::test_texttable"):
            os.write(fd, (json.dumps(["", "test", name, "passed"]) + "\n").encode())
        os.write(fd, (json.dumps(["", "end", "", 0]) + "\n").encode())
    except OSError:
        pass
"""

AT_THE_END = "cat >> texttable.py <<'END'\n{}\nEND"
"""Add to the source."""

STILL, EARLY = "5 of 5 tests still fail", "not run to their end"
CANARY = "a test that always fails did not fail"

# What a cheater does, and why it does not help.
CHEATERS = {
    "the tests are made empty": ("echo 'def test_x(): pass' > tests.py", STILL),
    "the tests are a link": ("ln -sf /dev/null tests.py", STILL),
    "the tests are a folder": ("rm tests.py; mkdir tests.py; touch tests.py/x", STILL),
    "a conftest lets all pass": (
        r"""cat > conftest.py <<'END'
import pytest
@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    outcome.get_result().outcome = "passed"
END""",
        STILL,
    ),
    "site hooks": (
        "for f in sitecustomize usercustomize; do echo 'import os; os._exit(0)' > $f.py; done; "
        "echo 'import os; os._exit(0)' > x.pth",
        STILL,
    ),
    "pytest's configuration": (
        "printf '[pytest]\naddopts = --co\n' | tee pytest.ini tox.ini; "
        "printf '[tool:pytest]\naddopts = --co\n' > setup.cfg",
        STILL,
    ),
    "an end before the end": (AT_THE_END.format('import os; print("22 passed"); os._exit(0)'), EARLY),
    "an end of the session": (AT_THE_END.format('import pytest; pytest.exit("done", returncode=0)'), STILL),
    "an end when pytest ends": (AT_THE_END.format("import atexit, os; atexit.register(os._exit, 0)"), STILL),
    "all tests are skipped": (
        AT_THE_END.format("import pytest; pytest.skip('', allow_module_level=True)"),
        STILL,
    ),
    "pytest's reports are changed": (
        AT_THE_END.format(
            "import _pytest.reports as p\n"
            'p.TestReport.outcome = property(lambda s: "passed", lambda s, v: None)'
        ),
        CANARY,
    ),
    "pytest calls nothing": (
        AT_THE_END.format("import _pytest.python as p\np.Function.runtest = lambda *a, **k: True"),
        CANARY,
    ),
    "results are written": (AT_THE_END.format(FORGE), EARLY),
    "a reward file and a daemon": (
        "echo 1 > reward.txt; mkdir -p /tmp/logs; echo 1 > /tmp/logs/reward; "
        "(setsid sh -c 'while true; do echo 22 passed; sleep 1; done' > /dev/null 2>&1 &)",
        STILL,
    ),
    "a link in place of the source": ("ln -sf /opt texttable.py", STILL),
    "names that are no text": (r"""touch "$(printf 'a\377.py')" """, "names that are no text"),
    "a patch without an end": ("head -c 9000000 /dev/urandom | base64 > big.txt", "larger than 1 MiB"),
    "git writes another patch": (
        "git config diff.external /bin/true; git config core.fsmonitor false; "
        "echo '*.py diff=x' > .gitattributes; git config diff.x.textconv 'echo'; echo > texttable.py",
        STILL,
    ),
    "git is gone": ("rm -rf .git", "git cannot tell what was changed"),
    "a history of its own": ("git commit -q --allow-empty -m x; git gc -q", "nothing was changed"),
    "all processes are ended": ("kill -9 -1; sleep 5", "nothing was changed"),
    "the disk is full": ("head -c 900000000 /dev/zero > zero", "git cannot tell what was changed"),
}


@pytest.mark.slow
@pytest.mark.bubblewrap
@pytest.mark.parametrize("way", CHEATERS)
def test_a_cheater_is_not_rewarded(env: Repair, way: str) -> None:
    command, why = CHEATERS[way]
    reward, info = play(env, "texttable-1.7.1", bash(command), SUBMIT)
    assert (reward, info["success"]) == (0.0, False)
    assert why in info["why"]


@pytest.mark.bubblewrap
def test_what_a_policy_does_to_tests_is_undone_and_its_repair_counts(env: Repair) -> None:
    task = env.find_task("texttable-1.7.1")
    mess = bash(
        f"{CHEATERS['the tests are a folder'][0]}\n{CHEATERS['site hooks'][0]}\n"
        f"{CHEATERS['a conftest lets all pass'][0]}\n"
        "mkdir -p pkg/tests; echo 'assert False' > pkg/tests/test_no.py; git add -A; git commit -q -m mine"
    )
    reward, info = play(env, task.id, mess, *env.expert(task))
    assert reward == 1.0, info["why"]
    dropped = {"conftest.py", "sitecustomize.py", "usercustomize.py", "x.pth", "tests.py", "tests.py/x"}
    assert dropped | {"pkg/tests/test_no.py"} == set(info["dropped"])


@pytest.mark.slow
@pytest.mark.bubblewrap
@pytest.mark.timeout(1800)
def test_every_oracle_is_rewarded(repair_data: Callable[..., Path]) -> None:
    folder = repair_data()
    todo = [task for split in Repair.splits for task in Repair(data=folder).tasks(split)]
    assert len(todo) == len(recipes().recipes)
    lost = {}

    async def player() -> None:
        env = Repair(data=folder)
        while todo:
            task = todo.pop()
            await env.areset(seed=0, options={"task_id": task.id})
            for action in env.expert(task):
                _, reward, *_, info = await env.astep(action)
            if reward != 1.0:
                lost[task.id] = info["why"]
        await env.aclose()

    async def play_all() -> None:
        await asyncio.gather(player(), player())

    asyncio.run(play_all())
    assert lost == {}


@pytest.mark.docker
@pytest.mark.slow
def test_a_repository_of_an_image_is_repaired(data: Path, tmp_path: Path, docker_daemon: str) -> None:
    """An image such as those of SWE-bench: a repository with all its history, and pytest."""
    import docker

    from agentgym.sandboxes.images import build

    record = json.loads((data / "instances.jsonl").read_text().splitlines()[0])
    ours = record.pop("agentgym")
    testbed = tmp_path / "testbed"
    shutil.copytree(data / "repositories" / record["instance_id"], testbed)
    # Its own configuration counts: the policy cannot change it.
    (testbed / "pytest.ini").write_text("[pytest]\npython_functions = test seen\n")
    (testbed / "test_seen.py").write_text("def seen():\n    pass\n")
    record["PASS_TO_PASS"].append("test_seen.py::seen")
    git = ["git", "-C", str(testbed), "-c", "user.name=x", "-c", "user.email=x"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "before"]):
        subprocess.run([*git, *command], check=True)
    asked = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
    subprocess.run([*git, "apply"], input=record["patch"], text=True, check=True)
    subprocess.run([*git, "commit", "-q", "-a", "-m", "after"], check=True)

    client = docker.DockerClient(docker_daemon)
    container = client.containers.create(build.tag(), "true")
    image = "agentgym-test/testbed"
    try:
        for source, target in [
            (testbed, "testbed"),
            *((data / "libraries" / name, "usr/lib/python3/dist-packages") for name in ours["libraries"]),
        ]:
            packed = io.BytesIO()
            with tarfile.open(fileobj=packed, mode="w") as tar:
                tar.add(source, target)
            assert container.put_archive("/", packed.getvalue())
        container.commit(image)
        place = tmp_path / "records.json"
        place.write_text(
            json.dumps([{**record, "base_commit": asked.stdout.strip(), "image_name": f"{image}:latest"}])
        )
        env = Repair(data=place, python="/usr/bin/python3", sandbox="docker")
        task = env.find_task(record["instance_id"])
        env.reset(seed=0, options={"task_id": task.id})
        assert env.step(bash("git log --oneline | wc -l; git status --short; git stash list"))[0] == "1"
        assert play(env, task.id, *env.expert(task))[0] == 1.0
        assert play(env, task.id, *env.nop(task))[0] == 0.0
        lost = play(env, task.id, bash("echo > pytest.ini"), *env.expert(task))
        assert (lost[0], lost[1]["dropped"]) == (1.0, ["pytest.ini"])
        assert play(env, task.id, bash(CHEATERS["pytest calls nothing"][0]), SUBMIT)[1]["why"] == CANARY
        env.close()
    finally:
        container.remove(force=True)
        with contextlib.suppress(docker.errors.ImageNotFound):
            client.images.remove(image)
        client.close()


@pytest.mark.docker
@pytest.mark.slow
def test_a_repository_of_a_folder_is_repaired_in_a_container(data: Path, docker_daemon: str) -> None:
    env = Repair(data=data, sandbox="docker")
    for task_id in QUICK:
        task = env.find_task(task_id)
        assert play(env, task_id, *env.expert(task))[0] == 1.0
        assert play(env, task_id, *env.nop(task))[0] == 0.0
    env.close()


@pytest.mark.docker
@pytest.mark.slow
def test_an_image_is_built_of_a_dockerfile_once(docker_daemon: str) -> None:
    import docker

    from agentgym.sandboxes.images import build

    client = docker.DockerClient(docker_daemon)
    image = "agentgym-test/built:1"
    with contextlib.suppress(docker.errors.ImageNotFound):
        client.images.remove(image)
    try:
        asyncio.run(
            repair_images.build(
                instance(image=image, dockerfile=f"FROM {build.tag()}\nENV MADE=1\n"), allowed=True
            )
        )
        assert "MADE=1" in client.images.get(image).attrs["Config"]["Env"]
        asyncio.run(repair_images.build(instance(image=image, dockerfile="nonsense"), allowed=True))
        with pytest.raises(EnvironmentFailed, match="cannot be built"):
            asyncio.run(repair_images.build(instance(image=f"{image}x", dockerfile="nonsense"), allowed=True))
    finally:
        with contextlib.suppress(docker.errors.ImageNotFound):
            client.images.remove(image)
        client.close()


# Building -----------------------------------------------------------------------------------


@pytest.mark.bubblewrap
def test_what_does_not_hold_is_left_out_and_what_cannot_be_had_is_told(
    repair_data: Callable[..., Path], tmp_path: Path
) -> None:
    repair_data(*QUICK)  # so that the archives are in the cache
    known = recipes()
    good, bad = (recipe for recipe in known.recipes if recipe.id in QUICK)
    wrong = bad.model_copy(update={"fail_to_pass": ("tests/test_none.py::test_none",)})
    lost = good.model_copy(update={"old": good.old.model_copy(update={"sha256": "0" * 64})})

    async def build(*chosen: Recipe) -> Any:
        async with make_backend("bubblewrap") as backend:
            parts = Recipes(libraries=known.libraries, recipes=chosen)
            return await repair_build.build(tmp_path, backend, Index(), chosen=parts)

    assert asyncio.run(build(good, wrong)) == repair_build.left_out(tmp_path) == {
        bad.id: "1 tests do not tell the releases apart here, such as tests/test_none.py::test_none"
    }  # fmt: skip
    assert [instance.id for instance in load(tmp_path)] == [good.id]
    assert not (tmp_path / "repositories" / bad.id).exists()
    with pytest.raises(DataUnavailable, match="no instance holds on this machine"):
        asyncio.run(build(wrong))
    with pytest.raises(DataUnavailable):
        asyncio.run(build(lost, good))


@pytest.mark.bubblewrap
def test_a_recipe_is_made_of_two_releases(repair_data: Callable[..., Path]) -> None:
    repair_data(*QUICK)
    (known,) = (recipe for recipe in recipes().recipes if recipe.id == "texttable-1.7.1")

    async def draft(old: str, new: str) -> Recipe:
        async with make_backend("bubblewrap") as backend:
            return await repair_build.draft("texttable", old, new, backend, Index(), runs=1)

    try:
        made = asyncio.run(draft("1.7.0", "1.7.1"))
    except DataUnavailable as error:
        pytest.skip(f"the package index cannot be read here: {error.message}")
    assert made == known.model_copy(update={"statement": "", "licence": made.licence})
    with pytest.raises(UsageError, match="changes no tests"):
        asyncio.run(draft("1.7.1", "1.7.1"))


@pytest.mark.bubblewrap
def test_the_command_takes_the_archives_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from click.testing import CliRunner

    from agentgym.cli.data import command

    monkeypatch.setenv("AGENTGYM_DATA", str(tmp_path / "data"))
    (tmp_path / "archives").mkdir()
    told = CliRunner().invoke(command, ["build", "repair", "--from", str(tmp_path / "archives")])
    assert isinstance(told.exception, DataUnavailable) and "is not in" in str(told.exception)
    assert not (tmp_path / "data" / "repair").exists()


def test_a_data_set_that_was_never_built_names_what_builds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AGENTGYM_DATA", str(tmp_path))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    with pytest.raises(MissingData, match="agentgym data build repair"):
        Repair().tasks("train")
