"""Shell tasks: solutions solve them, nothing does not, and what a policy leaves fools no judge."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from agentgym.actions import write_calls
from agentgym.environments.code import terminal_tasks as shop
from agentgym.environments.code.terminal import Terminal
from agentgym.environments.code.terminal_chore import Chore
from agentgym.errors import EnvironmentFailed, UnknownName, UsageError
from agentgym.messages import ToolCall
from agentgym.sandboxes.process import ProcessSandbox

SOME = ("files-modes", "text-quantiles", "archives-package", "processes-signal", "sqlite-index")


@pytest.fixture
def made() -> Iterator[Callable[..., Terminal]]:
    """Makes environments, and closes them."""
    open: list[Terminal] = []

    def make(**arguments: Any) -> Terminal:
        open.append(Terminal(**arguments))
        return open[-1]

    yield make
    for env in open:
        env.close()


def call(name: str, **arguments: Any) -> str:
    return write_calls([ToolCall(name, arguments)])


def play(env: Terminal, task_id: str, *commands: str) -> tuple[float, dict[str, Any]]:
    env.reset(seed=0, options={"task_id": task_id})
    for action in (*(call("bash", command=command) for command in commands), call("submit")):
        _, reward, terminated, _, info = env.step(action)
        if terminated:
            break
    assert terminated
    return reward, info


def solve(env: Terminal, task_id: str) -> float:
    return play(env, task_id, *env.find_task(task_id).private["oracle"])[0]


# The task sets ------------------------------------------------------------------------------


def test_the_splits_have_every_kind_of_task_and_no_variant_in_common() -> None:
    env = Terminal()
    sets = [env.tasks(split) for split in env.splits]
    assert [len(tasks) for tasks in sets] == [42 * 16, 42 * 2, 42 * 2]
    assert len({id for tasks in sets for id in tasks.ids}) == sum(map(len, sets))
    assert {shop.category(name) for name in shop.CHORES} == set(shop.CATEGORIES)
    for tasks in sets:
        assert {id.partition("/")[0] for id in tasks.ids} == set(shop.CHORES)
    task = sets[2][0]
    assert task.metadata == {"category": "files", "difficulty": "easy", "needs": ()}
    assert env.find_task(task.id) == task and "oracle" not in repr(task)


def test_tasks_are_chosen_by_category_and_by_what_the_sandbox_has() -> None:
    env = Terminal(without=["git"])
    assert len(env.left_out) == 7 and all(name.startswith("git-") for name in env.left_out)
    assert len(env.tasks("test")) == 35 * 2
    assert env.tasks("test").version != Terminal().tasks("test").version
    assert {id.split("-")[0] for id in Terminal(categories=["text", "sqlite"]).tasks("valid").ids} == {
        "text",
        "sqlite",
    }
    with pytest.raises(UnknownName, match="categories"):
        Terminal(categories=["texts"])
    with pytest.raises(UnknownName, match="without"):
        Terminal(without=["gti"])
    with pytest.raises(UsageError, match="no shell task is left"):
        Terminal(categories=["git"], without=["git"])


@pytest.mark.parametrize("name", shop.CHORES)
def test_a_variant_is_always_the_same_and_unlike_the_others(name: str, tmp_path: Path) -> None:
    needed(shop.CHORES[name])
    made, asked = [], []
    for place, variant in (("a", 3), ("b", 3), ("c", 4)):
        chore = shop.CHORES[name](variant)
        (tmp_path / place).mkdir()
        chore.lay(tmp_path / place)
        made.append(contents(tmp_path / place))
        drawn = {key: value for key, value in vars(chore).items() if key != "variant"}
        asked.append((chore.asked(), chore.oracle(), chore.runs(), drawn))
    assert made[0] == made[1] and asked[0] == asked[1]
    assert (made[0], asked[0]) != (made[2], asked[2])


def contents(folder: Path) -> dict[str, Any]:
    """Everything in a folder but what tells the time."""
    found: dict[str, Any] = {}
    for place in sorted(folder.rglob("*")):
        name = str(place.relative_to(folder))
        if place.is_symlink():
            found[name] = os.readlink(place)
        elif (
            place.is_file()
            and not name.endswith((".git/index", ".git/logs/HEAD"))
            and "/.git/logs/" not in name
        ):
            found[name] = place.stat().st_mode, place.read_bytes()
    return found


def needed(kind: type[Chore]) -> None:
    for program in kind.needs:
        if shutil.which(program) is None:
            pytest.skip(f"there is no {program}")


# Solutions ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOME)
def test_the_solution_solves_it_and_nothing_does_not(
    name: str, sandboxed: Mapping[str, Any], made: Callable[..., Terminal]
) -> None:
    env = made(**sandboxed)
    task = env.find_task(f"{name}/18")
    observation, info = env.reset(seed=0, options={"task_id": task.id})
    assert observation.startswith(task.instruction)
    assert [tool["function"]["name"] for tool in info["tools"]] == ["bash", "edit", "submit"]
    for action in env.expert(task):
        observation, reward, terminated, _, info = env.step(action)
    assert (reward, terminated, info["success"], info["why"]) == (1.0, True, True, "")
    env.reset(seed=0, options={"task_id": task.id})
    (action,) = env.nop(task)
    observation, reward, terminated, _, info = env.step(action)
    assert (reward, terminated, info["success"]) == (0.0, True, False) and info["why"]


@pytest.mark.slow
@pytest.mark.bubblewrap
@pytest.mark.parametrize("variant", [18, 19])
def test_every_solution_solves_its_task_and_nothing_solves_none(
    variant: int, made: Callable[..., Terminal]
) -> None:
    env = made()
    ids = [f"{name}/{variant}" for name in shop.CHORES]
    assert {id: solve(env, id) for id in ids} == dict.fromkeys(ids, 1.0)
    assert {id: play(env, id)[0] for id in ids} == dict.fromkeys(ids, 0.0)


@pytest.mark.docker
@pytest.mark.parametrize("name", ["processes-deleted", "git-lost", "text-quantiles"])
def test_containers_do_as_well(name: str, made: Callable[..., Terminal]) -> None:
    env = made(sandbox="docker")
    assert solve(env, f"{name}/18") == 1.0
    assert play(env, f"{name}/18")[0] == 0.0


def test_the_folder_is_judged_at_the_last_turn_too(
    unsafe: Mapping[str, Any], made: Callable[..., Terminal]
) -> None:
    env = made(max_steps=1, **unsafe)
    (command,) = env.find_task("files-largest/18").private["oracle"]
    for given, wanted in ((command, 1.0), ("true", 0.0)):
        env.reset(seed=0, options={"task_id": "files-largest/18"})
        _, reward, terminated, truncated, info = env.step(call("bash", command=given))
        assert (reward, terminated, truncated, info["success"]) == (wanted, False, True, wanted == 1.0)


def test_a_program_that_is_missing_is_named(
    unsafe: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch, made: Callable[..., Terminal]
) -> None:
    monkeypatch.setattr(shop.CHORES["files-largest"], "needs", ("no-such-program",))
    env = made(**unsafe)
    with pytest.raises(UsageError, match="needs no-such-program"):
        env.reset(seed=0, options={"task_id": "files-largest/18"})


def test_a_folder_that_cannot_be_made_is_no_reward(
    unsafe: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch, made: Callable[..., Terminal]
) -> None:
    monkeypatch.setattr(shop, "COMMAND", ("python3", "-c", "raise SystemExit('out of order')"))
    env = made(**unsafe)
    with pytest.raises(EnvironmentFailed, match="out of order"):
        env.reset(seed=0, options={"task_id": "files-largest/18"})


@pytest.mark.parametrize("name", shop.CHORES)
def test_what_comes_where_the_policy_works_neither_solves_nor_checks(name: str) -> None:
    chore = shop.CHORES[name](18)
    sent = shop.settle(f"{name}/18").decode()
    assert "oracle" not in sent and "check" not in sent and len(sent) < 12_000
    assert not any(json.dumps(command)[1:-1] in sent for command in chore.oracle())
    live = chore.live()
    assert (live is not None) == ("def start" in sent)


def test_the_policy_s_sandbox_is_told_nothing_else(
    unsafe: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch, made: Callable[..., Terminal]
) -> None:
    told: dict[str, list[bytes]] = {}
    run = ProcessSandbox.exec

    async def noted(self: ProcessSandbox, *arguments: Any, stdin: bytes = b"", **more: Any) -> Any:
        told.setdefault(self.id, []).append(stdin)
        return await run(self, *arguments, stdin=stdin, **more)

    monkeypatch.setattr(ProcessSandbox, "exec", noted)
    env = made(**unsafe)
    for task_id in ("files-largest/18", "processes-locks/18"):
        env.reset(seed=0, options={"task_id": task_id})
        assert told[env.sandbox.id] == [shop.settle(task_id)]
        assert [sandbox.id for sandbox in env._open] == [env.sandbox.id]
    assert any(b"def oracle" in stdin for given in told.values() for stdin in given)


# What a policy may leave --------------------------------------------------------------------

QUIET = [
    name
    for name, kind in shop.CHORES.items()
    if shop.category(name) != "processes" and not kind(5).runs() and name != "git-purge"
]
QUICK = ("files-mirror", "files-photos", "text-join", "archives-zip", "git-lost", "sqlite-import")
SPARE = (".tmp", ".list")


def _link(place: Path) -> None:
    right = place.with_name(place.name + ".right")
    place.rename(right)
    place.symlink_to(right.name)


def _pipe(place: Path) -> None:
    place.unlink()
    os.mkfifo(place)


def _folder(place: Path) -> None:
    place.unlink()
    place.mkdir()


def _huge(place: Path) -> None:
    os.truncate(place, 1 << 40)


def _noise(place: Path) -> None:
    place.write_bytes(b"\xff\x00" * 100)


HARM = (_link, _pipe, _folder, _huge, _noise)


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in QUIET]
)
def test_a_solution_with_one_thing_wrong_is_wrong(name: str, tmp_path: Path) -> None:
    needed(shop.CHORES[name])
    chore = shop.CHORES[name](5)
    before, after = tmp_path / "before", tmp_path / "after"
    for place in (before, after):
        place.mkdir()
        chore.lay(place)
    for command in chore.oracle():
        subprocess.run(["bash", "-c", command], cwd=after, check=True, capture_output=True, timeout=60)
    assert judged(chore, before, after) == ""
    old, new = contents(before), contents(after)
    changed = [
        n
        for n, c in new.items()
        if isinstance(c, tuple) and old.get(n) != c and ".git/" not in n and not n.endswith(SPARE)
    ]
    broken = tmp_path / "broken"
    for harm in HARM if changed else ():
        shutil.copytree(after, broken, symlinks=True)
        harm(broken / changed[-1])
        assert judged(chore, before, broken), (harm, changed[-1])
        shutil.rmtree(broken)
    broken.mkdir()
    assert judged(chore, before, broken)


def judged(chore: Chore, before: Path, after: Path) -> str:
    from agentgym.environments.code.terminal_chore import judged

    return judged(chore, str(before), str(after), [])


HOSTILE = {
    "links that lead out": "ln -s /etc/passwd largest.txt; ln -s ../.. up; ln -s / root",
    "links in a circle": "ln -s b a; ln -s a b; ln -s . largest.txt",
    "links through links": "mkdir d; ln -s . d/h; ln -s d/h/../.. largest.txt; ln -s d m; ln -s m/.. n",
    "a file that is too large": "truncate -s 5G largest.txt",
    "names with line ends": "echo > $'largest.txt\\n'; mkdir $'a\\n1'; echo > $'a\\n1/\\xff'; echo > ' '",
    "pipes and sockets": "mkfifo largest.txt; python3 -c 'import socket; socket.socket(1).bind(\"s\")'",
    "what nobody may read": "echo 1 > largest.txt; chmod 0 largest.txt; mkdir n; echo > n/x; chmod 0 n",
    "depth": "for i in $(seq 120); do mkdir -p d && cd d; done; echo > x",
    "too many files": "mkdir many; (cd many; seq 12000 | xargs touch)",
    "scripts that Python finds": "echo 'import os; os._exit(0)' | tee sitecustomize.py json.py "
    'random.py os.py > /dev/null; mkdir -p before after; cp json.py before; echo \'{"why": ""}\' > why',
    "a daemon": '(while :; do echo \'{"why": ""}\' > largest.txt; done) & disown',
}


@pytest.mark.bubblewrap
@pytest.mark.parametrize("way", HOSTILE)
def test_what_is_left_breaks_and_fools_nobody(way: str, made: Callable[..., Terminal]) -> None:
    env = made()
    reward, info = play(env, "files-largest/18", HOSTILE[way])
    assert reward == 0.0 and info["why"] and not info["success"]


@pytest.mark.bubblewrap
def test_what_else_is_left_does_no_harm(made: Callable[..., Terminal]) -> None:
    env = made()
    (command,) = env.find_task("files-largest/18").private["oracle"]
    odd = [HOSTILE[way] for way in ("names with line ends", "pipes and sockets", "links in a circle")]
    assert play(env, "files-largest/18", *odd, f"rm -rf largest.txt; {command}")[0] == 1.0


@pytest.mark.bubblewrap
def test_a_policy_that_ends_its_sandbox_is_scored(made: Callable[..., Terminal]) -> None:
    env = made()
    reward, info = play(env, "files-largest/18", "kill -9 -1; kill -9 1 $PPID")
    assert reward == 0.0 and not info["success"]


PROGRAMS = {
    "loops": "while :; do :; done",
    "says what a judge says": 'echo \'{"why": ""}\'; exit 0',
    "floods": "yes",
    "reads what is around": "cat ../before/* /proc/*/cmdline 2> /dev/null; ls -R ..",
    "kills": "kill -9 -1",
    "stays": "(setsid sleep 300 &) ; echo count 0; exit 3",
    "changes itself": "echo 'echo count 0; exit 3' > ../after/stats.sh; echo count 0",
}


@pytest.mark.bubblewrap
@pytest.mark.parametrize(
    "way",
    [pytest.param(way, marks=pytest.mark.slow) if way in ("loops", "floods") else way for way in PROGRAMS],
)
def test_a_program_earns_nothing_by_anything_but_its_answers(way: str, made: Callable[..., Terminal]) -> None:
    env = made()
    reward, _ = play(env, "text-quantiles/18", f"cat > stats.sh <<'END'\n{PROGRAMS[way]}\nEND")
    assert reward == 0.0


@pytest.mark.bubblewrap
def test_what_a_repository_would_run_does_not_run_where_it_is_judged(made: Callable[..., Terminal]) -> None:
    needed(shop.CHORES["git-lost"])
    env = made()
    task = env.find_task("git-lost/18")
    hooks = (
        "cd work; for k in core.fsmonitor core.pager core.sshCommand; do git config $k 'exit 1'; done; "
        "git config core.hooksPath .git/h; git config alias.log '!exit 1'; mkdir -p .git/h .git/objects/info;"
        "git config include.path /proc/self/mem; echo /work/before/work/.git > .git/objects/info/alternates; "
        "printf '#!/bin/sh\\nexit 1\\n' | tee .git/h/post-checkout .git/h/pre-auto-gc > /dev/null; "
        "chmod +x .git/h/*; cd .."
    )
    assert play(env, task.id, *task.private["oracle"], hooks)[0] == 1.0
    # An object under another's name is none.
    forged = (
        "cd work; git branch found 2>/dev/null; o=$(git rev-parse main | sed 's,^..,&/,'); "
        "chmod u+w .git/objects/$o; echo x > .git/objects/$o; cd .."
    )
    assert play(env, task.id, *task.private["oracle"], forged)[0] == 0.0
