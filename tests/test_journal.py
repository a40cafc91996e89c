from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentgym import journal as journals
from agentgym.errors import JournalError, StorageFailed, UnknownName, UsageError
from agentgym.journal import Journal, Reader, attempts, load, read
from agentgym.messages import Content, ImagePart, TextPart
from agentgym.outcome import Outcome
from agentgym.trajectory import Segment, Trajectory, Turn

# The head of a writer in a process of its own; `grow(trajectory, k)` adds the same turn there as here.
WRITER = """
import os, resource, sys, time
from agentgym.errors import AgentGymError, StorageFailed
from agentgym.journal import Journal
from agentgym.messages import ImagePart, TextPart
from agentgym.outcome import Outcome
from agentgym.trajectory import Segment, Trajectory, Turn

def grow(trajectory, k):
    if k % 7 == 0:
        trajectory.segments.append(Segment())
    segment = trajectory.segments[-1]
    segment.append_context([k, k + 1, k + 2])
    span = segment.append_sampled([k] * 50, [-k / 3] * 50)
    trajectory.turns.append(Turn(
        k, len(trajectory.segments) - 1, span, (TextPart(f"turn {k} é"),), "x" * (k * 37 % 900), "go", k / 7,
    ))
"""


_shared: dict[str, Any] = {}
exec(WRITER, _shared)
grow = _shared["grow"]


def blank(name: str = "e0", **fields: Any) -> Trajectory:
    return Trajectory(name, "agentgym/Echo-v0", "task", **fields)


def record(
    journal: Journal, trajectory: Trajectory, turns: int, outcome: Outcome | None = None
) -> Trajectory:
    journal.begin(trajectory)
    for k in range(turns):
        grow(trajectory, k)
        journal.turn(trajectory)
    if outcome is not None:
        trajectory.outcome = outcome
        journal.end(trajectory)
    return trajectory


def run_writer(script: str, *arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WRITER + script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **options)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two short episodes, the second unfinished."""
    folder = tmp_path_factory.mktemp("small")
    with Journal.create(folder, {"seed": 1}, fsync="never") as journal:
        for name in ("a", "c"):
            trajectory = blank(name)
            journal.begin(trajectory)
            for k in range(2):
                trajectory.segments = trajectory.segments or [Segment()]
                trajectory.segments[0].append_context([1])
                span = trajectory.segments[0].append_sampled([2, 3], [-0.5, -0.25])
                trajectory.turns.append(Turn(k, 0, span, (TextPart("o"),), "c", "a", 1.0))
                journal.turn(trajectory)
            if name == "a":
                trajectory.outcome = Outcome.completed()
                journal.end(trajectory)
    return folder


# What comes back ----------------------------------------------------------------------------

TEXT = st.text(st.characters(), max_size=20)  # lone surrogates included
TOKENS = st.lists(st.integers(-(2**31), 2**31 - 1), max_size=8)
LOGP = st.floats(allow_nan=False)
CONTENT = st.lists(
    st.one_of(
        TEXT.map(TextPart),
        st.builds(ImagePart, st.sampled_from([b"", b"one", b"two"]), st.sampled_from(["image/png", "x/y"])),
    ),
    max_size=3,
).map(tuple)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)
OUTCOMES = st.sampled_from(
    [
        Outcome.completed(),
        Outcome.truncated("turns"),
        Outcome.infra_failed("sandbox", "lost é", doubtful=True),
        Outcome.cancelled(),
    ]
)


def open_segment(data: st.DataObject, segments: list[Segment]) -> None:
    """A root, or a child that starts with tokens of its parent, as context or as they were."""
    if segments and data.draw(st.booleans()):
        parent = data.draw(st.integers(0, len(segments) - 1))
        length = data.draw(st.integers(0, len(segments[parent])))
        made = Segment(parent=(parent, length))
        source = segments[parent]
        if data.draw(st.booleans()):
            made.append_context(source.token_ids[:length])
        else:
            made.token_ids = source.token_ids[:length]
            made.loss_mask = source.loss_mask[:length]
            made.logp_rollout = source.logp_rollout[:length]
    else:
        made = Segment(parent=data.draw(st.none() | st.just((5, 3))))
    segments.append(made)


def take_turn(data: st.DataObject, trajectory: Trajectory) -> None:
    segments = trajectory.segments
    while not segments or data.draw(st.integers(0, 3)) == 0:
        open_segment(data, segments)
    index = data.draw(st.integers(max(0, len(segments) - 2), len(segments) - 1))
    segments[index].append_context(data.draw(TOKENS))
    sampled = data.draw(TOKENS)
    span = segments[index].append_sampled(sampled, [data.draw(LOGP) for _ in sampled])
    turn = data.draw(
        st.builds(
            Turn,
            index=st.just(len(trajectory.turns)),
            segment=st.just(index),
            span=st.just(span),
            observation=CONTENT,
            completion=TEXT,
            action=TEXT,
            reward=st.floats(allow_nan=False),
            valid_action=st.booleans(),
            finish_reason=st.sampled_from(["stop", "length", "abort"]),
            policy_version=st.integers(0, 5),
            seed=st.integers(0, 2**64),
            score=st.floats(allow_nan=False),
            success=st.booleans(),
            admissible_actions=st.none() | st.lists(TEXT, max_size=3).map(tuple),
            seconds=st.dictionaries(st.sampled_from(["generate", "step"]), st.floats(0, 9)),
            extras=st.dictionaries(TEXT, JSON, max_size=2),
        )
    )
    trajectory.turns.append(turn)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_what_is_loaded_equals_what_was_recorded(data: st.DataObject) -> None:
    expected: dict[str, list[Trajectory]] = {}
    with TemporaryDirectory() as folder:
        journal = Journal.create(folder, {}, fsync="never")
        for _ in range(data.draw(st.integers(1, 15))):
            name = data.draw(st.sampled_from(["a", "β", "c/\ud800"]))
            tried = expected.setdefault(name, [])
            what = data.draw(st.sampled_from(["turn", "turn", "turn", "end", "retry", "reopen"]))
            if what == "reopen":
                journal.close()
                journal = Journal.open(folder, fsync="never")
            if not tried or tried[-1].outcome is not None or what == "retry":
                group, instruction = data.draw(st.integers(0, 9)), data.draw(TEXT)
                tried.append(blank(name, attempt=len(tried), group=group, instruction=instruction))
                journal.begin(tried[-1])
            elif what == "turn":
                take_turn(data, tried[-1])
                journal.turn(tried[-1])
            elif what == "end":
                trajectory = tried[-1]
                if trajectory.segments:
                    trajectory.segments[-1].append_context(data.draw(TOKENS))
                trajectory.final_observation = data.draw(CONTENT)
                trajectory.outcome = data.draw(OUTCOMES)
                if trajectory.outcome.valid:
                    trajectory.scores = data.draw(st.dictionaries(TEXT, st.floats(-1, 1), max_size=2))
                journal.end(trajectory)
        journal.close()
        assert attempts(folder) == {name: tried for name, tried in expected.items() if tried}
        assert load(folder) == {name: tried[-1] for name, tried in expected.items() if tried}


def test_a_turn_holds_only_what_is_new(tmp_path: Path) -> None:
    trajectory = blank()
    with Journal.create(tmp_path, {}) as journal:
        record(journal, trajectory, 5)
        child = Segment(parent=(0, 200))
        child.append_context(trajectory.segments[0].token_ids[:200])
        trajectory.segments.append(child)
        span = child.append_sampled([7], [-1.0])
        trajectory.turns.append(Turn(5, 1, span, (), "c", "a", 0.0))
        journal.turn(trajectory)
    turns = [r for r in read(tmp_path) if r.type == "turn"]
    assert [sum(d["runs"]) for r in turns for d in r.data["segments"]] == [53] * 5 + [201]
    assert len(turns[5].data["segments"][0]["tokens"]) == 8  # one token: the parent has the others
    assert load(tmp_path)["e0"] == trajectory


def test_begin_takes_the_turns_that_a_replay_already_has(tmp_path: Path) -> None:
    with Journal.create(tmp_path, {}) as journal:
        trajectory = blank()
        for k in range(3):
            grow(trajectory, k)
        journal.begin(trajectory)
        grow(trajectory, 3)
        journal.turn(trajectory)
    assert load(tmp_path) == {"e0": trajectory}


def test_an_unfinished_trajectory_goes_on_after_reopening(tmp_path: Path) -> None:
    with Journal.create(tmp_path, {"seed": 3}) as journal:
        record(journal, blank("done"), 2, Outcome.completed())
        record(journal, blank("open"), 9)
    restored = load(tmp_path)["open"]
    assert restored.outcome is None
    with Journal.open(tmp_path) as journal:
        assert (journal.header, journal.repaired) == ({"seed": 3}, "")
        grow(restored, 9)
        journal.turn(restored)
        restored.outcome = Outcome.truncated("turns")
        journal.end(restored)
    whole = blank("open", outcome=Outcome.truncated("turns"))
    for k in range(10):
        grow(whole, k)
    assert load(tmp_path)["open"] == whole


def test_records_say_type_time_and_trajectory(tmp_path: Path) -> None:
    with Journal.create(tmp_path, {}) as journal:
        record(journal, blank(), 1, Outcome.completed())
        journal.score("e0", "judge", 0.5)
        journal.train(1, "e0", {"advantages": np.array([0.5, -0.5]), "ratio": np.float32(0.25)})
        journal.train(1, None, {"loss": 2.0})
    records = list(read(tmp_path))
    assert [r.type for r in records] == ["header", "episode", "turn", "outcome", "score", "train", "train"]
    assert [r.trajectory_id for r in records] == [None, *["e0"] * 5, None]
    assert records[5].data == {"step": 1, "data": {"advantages": [0.5, -0.5], "ratio": 0.25}}
    assert all(a.time <= b.time and a.offset < b.offset for a, b in pairwise(records))


def test_rescoring_appends_and_the_last_score_counts(tmp_path: Path) -> None:
    with Journal.create(tmp_path, {}) as journal:
        record(journal, blank(scores={"judge": 0.1}), 1, Outcome.completed())
        before = (tmp_path / journals.FILE).read_bytes()
        journal.score("e0", "judge", 0.9)
    assert (tmp_path / journals.FILE).read_bytes().startswith(before)
    assert [r.data["value"] for r in read(tmp_path) if r.type == "score"] == [0.1, 0.9]
    assert load(tmp_path)["e0"].scores == {"judge": 0.9}


@pytest.mark.parametrize("outcome", [Outcome.infra_failed("sandbox"), Outcome.cancelled()], ids=str)
def test_a_failure_gets_no_score(tmp_path: Path, outcome: Outcome) -> None:
    with Journal.create(tmp_path, {}) as journal:
        scored = blank("scored", outcome=outcome, scores={"judge": 1.0})
        journal.begin(scored)
        with pytest.raises(UsageError, match="no score"):
            journal.end(scored)
        record(journal, blank(), 2, outcome)
        with pytest.raises(UsageError, match="no score"):
            journal.score("e0", "judge", 1.0)
        with pytest.raises(UsageError, match="no score"):
            journal.train(1, "e0", {"advantages": [1.0]})
    with Journal.open(tmp_path) as journal, pytest.raises(UsageError, match="no score"):
        journal.score("e0", "judge", 1.0)
    assert not any(r.type in ("score", "train") for r in read(tmp_path))
    [ended] = [r for r in read(tmp_path) if r.type == "outcome"]
    assert set(ended.data) == {"outcome"}
    with pytest.raises(UsageError):
        _ = load(tmp_path)["e0"].reward


def test_calls_out_of_order_are_refused(tmp_path: Path) -> None:
    with Journal.create(tmp_path, {}) as journal:
        trajectory = blank()
        with pytest.raises(UsageError, match="not running"):
            journal.turn(trajectory)
        with pytest.raises(UnknownName, match="'e0'"):
            journal.score("e0", "judge", 1.0)
        record(journal, trajectory, 1)
        with pytest.raises(UsageError, match="has 1 turns; the journal holds 1 and expected 2"):
            journal.turn(trajectory)
        with pytest.raises(UsageError, match="no outcome"):
            journal.end(trajectory)
        with pytest.raises(UsageError, match="has not ended"):
            journal.score("e0", "judge", 1.0)
        trajectory.outcome = Outcome.completed()
        journal.end(trajectory)
        with pytest.raises(UsageError, match="not running"):
            journal.end(trajectory)
    with pytest.raises(JournalError, match="closed"):
        journal.score("e0", "judge", 1.0)
    journal.close()


@pytest.mark.parametrize("extras", [{"task": object()}, {"loop": ...}, {("a", "b"): 1}])
def test_a_value_that_json_cannot_hold_is_refused_and_nothing_is_written(tmp_path: Path, extras: Any) -> None:
    if "loop" in extras:
        extras["loop"] = extras
    with Journal.create(tmp_path, {}) as journal:
        trajectory = record(journal, blank(), 1)
        trajectory.turns.append(Turn(1, 0, (0, 0), (), "c", "a", 0.0, extras=extras))
        with pytest.raises(UsageError, match="cannot record the turn of 'e0'"):
            journal.turn(trajectory)
        trajectory.turns[-1] = Turn(1, 0, (0, 0), (), "c", "a", 0.0)
        trajectory.segments[0].append_context([2**31])
        with pytest.raises(UsageError, match="32-bit"):
            journal.turn(trajectory)
    assert len(load(tmp_path)["e0"].turns) == 1


def test_it_replays_into_a_trainer_without_inference(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from agentgym.trainers.batch import collate, rows

    with Journal.create(tmp_path, {}) as journal:
        live = [record(journal, blank(f"e{i}"), 3 * i + 2, Outcome.completed()) for i in range(3)]
        record(journal, blank("lost"), 2, Outcome.infra_failed("environment"))

    def gradient(trajectories: list[Trajectory]) -> Any:
        batch = collate(rows(trajectories))
        weight = torch.linspace(-1, 1, 64 * 64).reshape(64, 64).requires_grad_()
        logp = torch.log_softmax(weight[batch.input_ids[:, :-1]], -1)
        logp = logp.gather(-1, batch.targets.unsqueeze(-1)).squeeze(-1)
        advantage = torch.tensor([t.reward for t in trajectories if t.valid])[batch.trajectory, None]
        ratio = torch.exp(logp - batch.logp_rollout)
        (-(ratio * advantage)[batch.loss_mask].mean()).backward()
        return weight.grad

    replayed = list(load(tmp_path).values())
    assert torch.equal(gradient(replayed), gradient(live))
    assert gradient(live).abs().sum() > 0


# Images -------------------------------------------------------------------------------------


def seen(image: bytes, k: int = 0) -> Turn:
    return Turn(k, 0, (0, 0), (TextPart("look"), ImagePart(image)), "c", "a", 0.0)


def test_an_image_is_stored_once_by_its_digest(tmp_path: Path) -> None:
    with Journal.create(tmp_path, {}) as journal:
        trajectory = blank()
        journal.begin(trajectory)
        for k in range(3):
            trajectory.turns.append(seen(b"same", k))
            journal.turn(trajectory)
    [blob] = (tmp_path / journals.BLOBS).iterdir()
    assert (blob.name, blob.read_bytes()) == (ImagePart(b"same").digest, b"same")
    assert load(tmp_path)["e0"] == trajectory
    blob.write_bytes(b"sane")
    with pytest.raises(JournalError, match="damaged"):
        load(tmp_path)
    blob.unlink()
    with pytest.raises(JournalError, match="missing"):
        load(tmp_path)


def test_a_blob_that_a_crash_left_empty_is_written_again(tmp_path: Path) -> None:
    blob = tmp_path / journals.BLOBS / ImagePart(b"pixels").digest
    blob.parent.mkdir()
    blob.touch()
    with Journal.create(tmp_path, {}) as journal:
        trajectory = blank()
        trajectory.turns.append(seen(b"pixels"))
        journal.begin(trajectory)
    assert load(tmp_path)["e0"] == trajectory


# The death of the writer --------------------------------------------------------------------

ENDLESS = """
journal = Journal.create(sys.argv[1], {}, fsync="segment")
for episode in range(100000):
    trajectory = Trajectory(f"e{episode}", "agentgym/Echo-v0", "task")
    journal.begin(trajectory)
    for k in range(10):
        grow(trajectory, k)
        journal.turn(trajectory)
        os.write(1, f"{episode} {k}\\n".encode())
    trajectory.outcome = Outcome.completed()
    journal.end(trajectory)
"""


@pytest.mark.parametrize("seed", range(5))
def test_kill_9_loses_no_finished_turn(tmp_path: Path, seed: int) -> None:
    child = subprocess.Popen([sys.executable, "-c", WRITER + ENDLESS, tmp_path], stdout=subprocess.PIPE)
    assert child.stdout is not None
    chance = random.Random(seed)
    reported = [child.stdout.readline() for _ in range(chance.randrange(1, 400))]
    child.send_signal(signal.SIGKILL)
    reported += child.stdout.readlines()
    child.stdout.close()
    child.wait()
    finished = [tuple(map(int, line.split())) for line in reported if line.endswith(b"\n")]
    found = load(tmp_path)
    for episode, k in finished:
        assert found[f"e{episode}"].turns[k].index == k
    last = found[f"e{finished[-1][0]}"]
    expected = blank(last.id, outcome=last.outcome)
    for k in range(len(last.turns)):
        grow(expected, k)
    assert last == expected
    with Journal.open(tmp_path) as journal:  # the lock died with its holder
        if last.outcome is None:
            grow(last, len(last.turns))
            journal.turn(last)
    assert load(tmp_path)[last.id] == last


def test_a_forked_worker_that_outlives_the_writer_does_not_hold_the_run(tmp_path: Path) -> None:
    script = """
journal = Journal.create(sys.argv[1], {})
if os.fork() == 0:
    os.write(1, b"forked")
    os.read(0, 1)
    os._exit(0)
time.sleep(60)
"""
    child = subprocess.Popen(
        [sys.executable, "-c", WRITER + script, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdin is not None and child.stdout is not None
    assert child.stdout.read(6) == b"forked"
    child.kill()
    child.wait()
    try:
        Journal.open(tmp_path).close()
    finally:
        child.stdin.close()
        child.stdout.close()


def test_a_journal_cut_at_any_byte_keeps_every_whole_record(small: Path, tmp_path: Path) -> None:
    whole = (small / journals.FILE).read_bytes()
    records = list(read(small))
    ends = [*(r.offset for r in records[1:]), len(whole)]
    path = tmp_path / journals.FILE
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        kept = [r for r, end in zip(records, ends, strict=True) if end <= size]
        if not kept:  # the header appears whole or not at all, so this is no torn end
            with pytest.raises(JournalError):
                list(read(tmp_path))
            with pytest.raises(JournalError):
                Journal.open(tmp_path)
            continue
        reader = Reader(tmp_path)
        assert list(reader.poll()) == kept
        torn = size - ends[len(kept) - 1]
        assert (reader.offset, reader.torn) == (size - torn, torn)
        assert path.stat().st_size == size
        with Journal.open(tmp_path, fsync="never") as journal:
            assert bool(journal.repaired) == (torn > 0)
            journal.train(1, None, {"kept": len(kept)})
        *before, after = read(tmp_path)
        assert before == kept
        assert after.data == {"step": 1, "data": {"kept": len(kept)}}


def test_a_repair_says_what_was_cut_and_what_is_left(small: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(small, tmp_path / "run")) / journals.FILE
    path.write_bytes(path.read_bytes()[:-5])
    cut = path.stat().st_size - list(read(path.parent))[-1].offset
    with Journal.open(path.parent) as journal:
        assert journal.repaired.startswith("cut ")
        assert journal.repaired.endswith("the last whole record is turn 0 of 'c'")
        restored = load(path.parent)["c"]
        restored.turns.append(Turn(1, 0, (0, 0), (), "c", "a", 0.0))
        journal.turn(restored)
    assert int(journal.repaired.split()[1]) < cut
    assert load(path.parent)["c"] == restored


# Damage -------------------------------------------------------------------------------------


def check_damage(small: Path, folder: Path, damaged: bytes) -> None:
    """Damage is an error, or the end is reported torn; what is read is what was written."""
    whole = list(read(small))
    (folder / journals.FILE).write_bytes(damaged)
    reader, found = Reader(folder), []
    try:
        for record in reader.poll():
            found.append(record)
    except JournalError as error:
        assert error.hint
    else:
        assert reader.torn > 0
        assert len(found) == len(whole) - 1
    assert found == whole[: len(found)]
    assert len(found) < len(whole)


def test_a_flipped_bit_is_detected_in_every_byte(small: Path, tmp_path: Path) -> None:
    whole = (small / journals.FILE).read_bytes()
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        check_damage(small, tmp_path, bytes(damaged))


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_change_of_bytes_is_detected(small: Path, data: st.DataObject) -> None:
    whole = bytearray((small / journals.FILE).read_bytes())
    start = data.draw(st.integers(0, len(whole) - 1))
    noise = data.draw(st.binary(min_size=1, max_size=60))
    damaged = whole[:start] + noise + whole[start + len(noise) :]
    last = list(read(small))[-1].offset
    if damaged[: len(whole)] == whole or start >= last:
        return
    with TemporaryDirectory() as folder:
        (Path(folder) / journals.FILE).write_bytes(damaged)
        if start + len(noise) <= last:
            with pytest.raises(JournalError, match=r"damaged|no journal|schema"):
                list(read(folder))
            with pytest.raises(JournalError):
                Journal.open(folder)
            assert (Path(folder) / journals.FILE).read_bytes() == damaged  # an error changes nothing
        else:
            reader = Reader(folder)
            assert len(list(reader.poll())) < len(list(read(small)))
            assert reader.torn > 0


def test_a_newer_schema_is_refused_with_a_hint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(journals, "SCHEMA", journals.SCHEMA + 1)
        Journal.create(tmp_path, {}).close()
    for what in (load, Journal.open):
        with pytest.raises(JournalError, match="schema version 2; this release reads up to 1") as caught:
            what(tmp_path)
        assert "upgrade" in caught.value.hint


@pytest.mark.parametrize("content", [b"", b"{}", b"AGENTGYM", b"PAR1" * 100])
def test_another_file_is_no_journal(tmp_path: Path, content: bytes) -> None:
    (tmp_path / journals.FILE).write_bytes(content)
    with pytest.raises(JournalError, match="no journal"):
        load(tmp_path)
    with pytest.raises(JournalError, match="already holds"):
        Journal.create(tmp_path, {})


def test_a_missing_journal_is_named(tmp_path: Path) -> None:
    for what in (load, Journal.open, journals.header):
        with pytest.raises(JournalError, match=str(tmp_path)):
            what(tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UnknownName, match="'always'"):
        Journal.create(tmp_path / "new", {}, fsync="always")  # type: ignore[arg-type]
    assert not (tmp_path / "new").exists()


# One writer ---------------------------------------------------------------------------------

INTRUDE = """
for start in (lambda: Journal.open(sys.argv[1]), lambda: Journal.create(sys.argv[1], {})):
    try:
        start()
    except AgentGymError as error:
        print(type(error).__name__, error.hint)
"""


def test_a_second_writer_is_refused_and_told_who_holds_the_run(tmp_path: Path) -> None:
    with Journal.create(tmp_path, {}) as journal:
        record(journal, blank(), 1)
        refused = run_writer(INTRUDE, tmp_path).stdout.splitlines()
        assert [line.split()[0] for line in refused] == ["JournalError"] * 2
        assert all(f"process {os.getpid()} " in line for line in refused)
        with pytest.raises(JournalError, match="another writer"):  # in the same process, too
            Journal.open(tmp_path)
        trajectory = load(tmp_path)["e0"]
        grow(trajectory, 1)
        journal.turn(trajectory)
    Journal.open(tmp_path).close()


def test_create_does_not_touch_an_existing_run(tmp_path: Path) -> None:
    with Journal.create(tmp_path, {"seed": 1}) as journal:
        record(journal, blank(), 1)
    before = (tmp_path / journals.FILE).read_bytes()
    with pytest.raises(JournalError, match="already holds"):
        Journal.create(tmp_path, {"seed": 2})
    assert (tmp_path / journals.FILE).read_bytes() == before
    assert journals.header(tmp_path) == {"seed": 1}


def test_a_reader_follows_a_file_that_is_being_written(tmp_path: Path) -> None:
    script = """
trajectory = Trajectory("e0", "agentgym/Echo-v0", "task")
journal = Journal.create(sys.argv[1], {}, fsync="never")
os.write(1, b"created")
journal.begin(trajectory)
for k in range(3000):
    grow(trajectory, k)
    journal.turn(trajectory)
trajectory.outcome = Outcome.completed()
journal.end(trajectory)
"""
    child = subprocess.Popen([sys.executable, "-c", WRITER + script, tmp_path], stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.read(7) == b"created"
    reader, found, polls = Reader(tmp_path), list[str](), 0
    while not found or found[-1] != "outcome":
        found += [r.type for r in reader.poll()]
        polls += 1
    assert child.wait() == 0
    child.stdout.close()
    assert found == ["header", "episode", *["turn"] * 3000, "outcome"]
    assert polls > 1
    assert list(reader.poll()) == []


def test_a_reader_waits_for_the_rest_of_a_record(small: Path, tmp_path: Path) -> None:
    whole = (small / journals.FILE).read_bytes()
    path, reader, found = tmp_path / journals.FILE, Reader(tmp_path), []
    path.write_bytes(whole[:200])
    for size in range(200, len(whole) + 1, 7):
        path.write_bytes(whole[:size])
        found += reader.poll()
    path.write_bytes(whole)
    assert [*found, *reader.poll()] == list(read(small))


# A full disk --------------------------------------------------------------------------------

FILL = """
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
trajectory = Trajectory("e0", "agentgym/Echo-v0", "task")
try:
    journal = Journal.create(sys.argv[1], {})
    journal.begin(trajectory)
    for k in range(1000):
        grow(trajectory, k)
        journal.turn(trajectory)
except StorageFailed as error:
    print(k if trajectory.turns else -1, error.hint)
    if trajectory.turns:
        for late in (lambda: journal.turn(trajectory), journal.sync):
            try:
                late()
            except StorageFailed:
                print("refused")
        journal.close()
"""


@pytest.mark.parametrize("limit", [*range(20_000, 20_700, 87), 100_000])
def test_a_full_disk_stops_the_run_and_leaves_whole_records(tmp_path: Path, limit: int) -> None:
    said = run_writer(FILL, tmp_path, limit)
    assert said.stderr == ""
    first, *late = said.stdout.splitlines()
    turns, hint = int(first.split()[0]), first.split(maxsplit=1)[1]
    assert "resume" in hint and late == ["refused"] * 2
    reader = Reader(tmp_path)
    records = list(reader.poll())
    assert (reader.torn, len(records)) == (0, turns + 2)
    with Journal.open(tmp_path) as journal:  # there is room again
        assert journal.repaired == ""
        restored = load(tmp_path)["e0"]
        grow(restored, turns)
        journal.turn(restored)
    assert len(load(tmp_path)["e0"].turns) == turns + 1


def test_a_disk_too_full_for_the_header_leaves_no_journal(tmp_path: Path) -> None:
    assert run_writer(FILL, tmp_path, 40).stdout.startswith("-1 free")
    with pytest.raises(JournalError, match="no journal"):
        load(tmp_path)
    Journal.create(tmp_path, {}).close()


def test_a_disk_too_full_for_an_image_leaves_no_record_of_it(tmp_path: Path) -> None:
    script = """
journal = Journal.create(sys.argv[1], {})
trajectory = Trajectory("e0", "agentgym/Echo-v0", "task")
journal.begin(trajectory)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000,) * 2)
trajectory.turns.append(Turn(0, 0, (0, 0), (ImagePart(bytes(20_000)),), "c", "a", 0.0))
for attempt in range(2):
    try:
        journal.turn(trajectory)
    except StorageFailed as error:
        print(error.boundary)
"""
    assert run_writer(script, tmp_path).stdout.split() == ["storage"] * 2
    assert load(tmp_path)["e0"].turns == []
    assert list((tmp_path / journals.BLOBS).iterdir()) == []


def test_a_folder_that_cannot_be_written_is_a_storage_failure(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageFailed, match="cannot write"):
        Journal.create(tmp_path / "file" / "run", {})


# Durability and secrets ---------------------------------------------------------------------


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the files that were synced."""
    names: list[str] = []
    real = os.fsync

    def note(descriptor: int) -> None:
        names.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    yield names


@pytest.mark.parametrize(("fsync", "syncs"), [("never", 0), ("segment", 2), ("turn", 5)])
def test_fsync_by_segment_or_by_turn(tmp_path: Path, synced: list[str], fsync: Any, syncs: int) -> None:
    with Journal.create(tmp_path, {}, fsync=fsync) as journal:
        synced.clear()
        record(journal, blank(), 3, Outcome.completed())
    assert synced.count(journals.FILE) == syncs


def test_images_are_synced_before_the_records_that_name_them(tmp_path: Path, synced: list[str]) -> None:
    content: Content = (ImagePart(b"pixels"),)
    with Journal.create(tmp_path, {}, fsync="turn") as journal:
        trajectory = blank()
        journal.begin(trajectory)
        synced.clear()
        trajectory.turns.append(Turn(0, 0, (0, 0), content, "c", "a", 0.0))
        journal.turn(trajectory)
    assert synced[:3] == [ImagePart(b"pixels").digest, journals.BLOBS, journals.FILE]


def test_no_secret_reaches_the_file(tmp_path: Path) -> None:
    config = {"policy": {"api_key": "hush-123", "max_tokens": 256}, "argv": ["eval", "--token", "hush-456"]}
    with Journal.create(tmp_path, {"config": config}) as journal:
        assert journal.header["config"]["policy"] == {"api_key": "***", "max_tokens": 256}
    assert b"hush" not in (tmp_path / journals.FILE).read_bytes()
    assert json.dumps(journals.header(tmp_path)) == json.dumps(journal.header)
