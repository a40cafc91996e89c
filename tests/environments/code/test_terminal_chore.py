"""What shell tasks are made of: seeded choices, and readers that take anything that a policy may leave."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agentgym.environments.code import terminal_tasks as shop
from agentgym.environments.code.terminal_archives import members, packed
from agentgym.environments.code.terminal_chore import MOST_BYTES, Draw, Tree, Wrong, judged, unchanged
from agentgym.environments.code.terminal_database import Database, make
from agentgym.environments.code.terminal_repository import Repository, Story

HERE = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
NAMES = st.text(
    st.characters(blacklist_characters="/\0", blacklist_categories=["Cs"]), min_size=1, max_size=20
)
TREES = st.dictionaries(
    NAMES.filter(lambda name: name not in (".", "..")), st.binary(max_size=40), max_size=5
)


def test_a_stream_of_choices_is_the_same_for_ever() -> None:
    draw = Draw("text-join", 3, "plan")
    assert [draw.below(100) for _ in range(6)] == [Draw("text-join", 3, "plan").below(100), *_rest()]
    assert Draw("a").token(6) != Draw("b").token(6)


def _rest() -> list[int]:
    draw = Draw("text-join", 3, "plan")
    return [draw.below(100) for _ in range(6)][1:]


@given(st.integers(), st.integers(1, 40), st.integers(0, 40))
def test_choices_are_among_what_there_is(seed: int, count: int, wanted: int) -> None:
    draw, among = Draw(seed), list(range(count))
    some = draw.some(among, wanted)
    assert len(some) == min(count, wanted) == len(set(some)) and set(some) <= set(among)
    assert sorted(draw.shuffled(among)) == among
    assert 3 <= draw.between(3, 3 + count) <= 3 + count


@given(name=st.text(max_size=30))
def test_a_name_is_looked_up_below_the_folder_only(
    name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.getbasetemp()
    assert Tree(root).kind(f"../{name}") == "nothing"
    with contextlib.suppress(UnicodeEncodeError):
        assert Tree(root).kind(name) in ("file", "folder", "link", "other", "nothing")


def test_a_reader_follows_no_link_and_opens_no_pipe(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "x").write_text("x\n\n")
    (tmp_path / "way").symlink_to("real")
    (tmp_path / "link").symlink_to("real/x")
    os.mkfifo(tmp_path / "pipe")
    with (tmp_path / "large").open("wb") as large:
        large.truncate(MOST_BYTES + 1)
    tree = Tree(tmp_path)
    assert tree.lines("real/x") == ["x", ""] and tree.link("link") == "real/x"
    for name in ("way/x", "link", "pipe", "large", "none", "real", "real/x/y", "../" + tmp_path.name):
        with pytest.raises(Wrong):
            tree.data(name)
    assert set(tree.entries().values()) == {"file", "folder", "link", "other"}
    with pytest.raises(Wrong):
        tree.entries("way")
    (tmp_path / "large").unlink()
    unchanged(tree, tree, "real", "link")


@HERE
@given(tree=TREES, name=st.sampled_from(["files-photos", "text-join", "archives-zip", "sqlite-orphans"]))
def test_whatever_is_left_is_judged(tree: dict[str, bytes], name: str, tmp_path: Path) -> None:
    chore = shop.CHORES[name](7)
    before, after = tmp_path / f"before-{name}", tmp_path / "after"
    if not before.exists():
        before.mkdir()
        chore.lay(before)
    shutil.copytree(before, after)
    try:
        for inside, data in tree.items():
            (after / inside).write_bytes(data)
        outputs = [place for place in sorted(after.rglob("*")) if place.is_file()]
        for place, data in zip(outputs, tree.values(), strict=False):
            place.write_bytes(data)
        said = judged(chore, str(before), str(after), [])
        assert said and "cannot be judged" not in said
    finally:
        shutil.rmtree(after)


def mutated(data: bytes) -> st.SearchStrategy[bytes]:
    """The bytes, cut or with some changed."""
    changed = st.lists(st.tuples(st.integers(0, len(data) - 1), st.integers(0, 255)), max_size=8)

    def apply(changes: list[tuple[int, int]], end: int) -> bytes:
        made = bytearray(data)
        for place, value in changes:
            made[place] = value
        return bytes(made[:end])

    return st.builds(apply, changed, st.integers(0, len(data)))


ARCHIVE = packed({"a/b": b"x" * 700, "c": b""}, squeeze=True)


@given(st.one_of(st.binary(max_size=2000), mutated(ARCHIVE), mutated(packed({"a": b"1"}))))
def test_any_bytes_are_an_archive_or_none(data: bytes) -> None:
    with contextlib.suppress(Wrong):
        assert all(kind in ("file", "folder", "other") for kind, _ in members(data, "x").values())


def test_an_archive_that_unpacks_to_too_much_is_none() -> None:
    bomb = packed({"zeros": bytes(5 * MOST_BYTES)}, squeeze=True)
    assert len(bomb) < MOST_BYTES // 10
    with pytest.raises(Wrong, match="too much"):
        members(bomb, "x")


@HERE
@given(data=st.data())
def test_any_bytes_are_a_database_or_none(data: st.DataObject, tmp_path: Path) -> None:
    whole = tmp_path / "whole.db"
    if not whole.exists():
        make(
            whole, "CREATE TABLE t (a INTEGER, b TEXT); CREATE INDEX i ON t (a);", {"t": [(1, "x"), (2, "y")]}
        )
    (tmp_path / "some.db").write_bytes(data.draw(mutated(whole.read_bytes())))
    with contextlib.suppress(Wrong):
        base = Database(Tree(tmp_path), "some.db")
        base.rows("SELECT * FROM t ORDER BY a")
        base.columns("t")


def test_a_view_is_no_table_and_an_endless_one_ends(tmp_path: Path) -> None:
    endless = (
        "WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r WHERE n < 1e12) SELECT sum(n) FROM r"
    )
    make(tmp_path / "x.db", f"CREATE VIEW t AS {endless};", {})
    base = Database(Tree(tmp_path), "x.db")
    with pytest.raises(Wrong, match="no table"):
        base.table("t")
    with pytest.raises(Wrong, match="cannot be read"):
        base.rows("SELECT * FROM t")


@pytest.mark.skipif(shutil.which("git") is None, reason="there is no git")
def test_an_object_under_another_s_name_is_none(tmp_path: Path) -> None:
    story = Story()
    story.commit("main", "one", {"a": "1\n"})
    story.tell(tmp_path / "r")
    tree = Tree(tmp_path)
    repository = Repository(tree, "r")
    tip = repository.tip("main")
    assert repository.blob(repository.files(tip)["a"]) == b"1\n"
    objects = [place for place in (tmp_path / "r/.git/objects").glob("??/*")]
    (first, second) = sorted(objects)[:2]
    first.chmod(0o644)
    first.write_bytes(second.read_bytes())
    with pytest.raises(Wrong, match="what its name says"):
        Repository(tree, "r")
    with pytest.raises(Wrong):
        Repository(tree, "none")
