from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentgym.sandboxes import Sandbox, SandboxSpec, make_backend
from agentgym.tools import ToolResult, make_tool
from agentgym.tools import edit as edit_module
from agentgym.tools.edit import edit_tool, inserted, places, read_text

Run = Callable[..., Any]
POEM = "one\ntwo\nthree\nfour\n"


def calls(
    play: Run, files: dict[str, str | bytes], *arguments: dict[str, Any], **options: Any
) -> tuple[list[ToolResult], dict[str, bytes]]:
    """What the calls gave, and the files after them."""

    async def body(sandbox: Sandbox) -> tuple[list[ToolResult], dict[str, bytes]]:
        for name, data in files.items():
            await sandbox.write(name, data)
        made = edit_tool(sandbox, **options)
        told = [await made.acall(given) for given in arguments]
        return told, {name: await sandbox.read(name) for name in files}

    result: tuple[list[ToolResult], dict[str, bytes]] = play(body)
    return result


class TestView:
    def test_lines_have_numbers(self, play: Run) -> None:
        told, _ = calls(
            play,
            {"a.txt": POEM, "b.txt": "x\r\ny", "c.txt": ""},
            {"command": "view", "path": "a.txt"},
            {"command": "view", "path": "a.txt", "start": 2, "end": 3},
            {"command": "view", "path": "/work/a.txt", "start": 4, "end": 99},
            {"command": "view", "path": "b.txt"},
            {"command": "view", "path": "c.txt"},
        )
        assert [result.content for result in told] == [
            "     1\tone\n     2\ttwo\n     3\tthree\n     4\tfour",
            "     2\ttwo\n     3\tthree",
            "     4\tfour",
            "     1\tx\n     2\ty\n[no line end after the last line]",
            "c.txt is empty",
        ]

    def test_long_files_and_lines_are_cut(self, play: Run) -> None:
        long = "\n".join(f"line {n}" for n in range(1, 1001)) + "\n"
        told, _ = calls(
            play,
            {"long": long, "wide": "y" * 5_000 + "\n"},
            {"command": "view", "path": "long"},
            {"command": "view", "path": "wide"},
            limit=1_000,
        )
        assert told[0].content.endswith("\n[lines 1 to 67 of 1000; start and end show others]")
        assert told[0].content.count("\n") == 67
        assert told[1].content.endswith("y… [3000 more characters]")

    def test_folders_two_levels_deep(self, play: Run) -> None:
        files = {"src/a.py": "", "src/deep/b.py": "", "src/deep/er/c.py": "", ".git/HEAD": "", "z": ""}
        told, _ = calls(
            play,
            dict(files),
            {"command": "view", "path": "."},
            {"command": "view", "path": "src/deep/er"},
            {"command": "view", "path": "src", "start": 1},
        )
        assert told[0].content == ". holds:\n.git/\nsrc/\nsrc/a.py\nsrc/deep/\nz"
        assert told[1].content == "src/deep/er holds:\nc.py"
        assert told[2].content == "Error: src is a folder, and has no lines"

    def test_many_entries_are_cut_and_wild_names_escaped(
        self, play: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(edit_module, "ENTRIES", 3)
        files = {"a\nb": "", "d": "", "e": "", "f": "", "g": ""}
        told, _ = calls(play, dict(files), {"command": "view", "path": "."})
        assert told[0].content == ". holds:\na\\nb\nd\ne\n[more than 3 entries]"

    @pytest.mark.parametrize(
        ("data", "arguments", "words"),
        [
            (b"\x00\x01", {}, "binary"),
            (b"\xff\xfe\xfa", {}, "binary file, or no UTF-8"),
            (b"x" * 2_000, {}, "has 2000 bytes, and files of at most 1500"),
            (b"x\n", {"start": 2}, "has 1 lines; there are no lines 2 to 1"),
            (b"x\ny\n", {"start": 2, "end": 1}, "no lines 2 to 1"),
            (b"x\n", {"start": 0}, "no lines 0 to 1"),
        ],
    )
    def test_what_cannot_be_shown(
        self, play: Run, data: bytes, arguments: dict[str, Any], words: str
    ) -> None:
        told, _ = calls(play, {"f": data}, {"command": "view", "path": "f", **arguments}, max_bytes=1_500)
        assert not told[0].ok
        assert words in told[0].content

    @pytest.mark.parametrize(
        ("path", "words"),
        [
            ("nowhere", "there is no nowhere"),
            ("no/where", "there is no no/where"),
            ("file/x", "Not a directory"),
            ("/dev/null", "no regular file"),
            ("", "the path is empty"),
            ("a\0b", "the path is empty, or none"),
            ("-c", "there is no -c"),
            ("x" * 5_000, "File name too long"),
        ],
    )
    def test_paths_that_are_none(self, play: Run, path: str, words: str) -> None:
        told, _ = calls(play, {"file": ""}, {"command": "view", "path": path})
        assert not told[0].ok
        assert words in told[0].content


class TestCreate:
    def test_a_file_and_its_folders(self, play: Run) -> None:
        async def body(sandbox: Sandbox) -> list[str]:
            made = edit_tool(sandbox)
            await sandbox.exec("printf old >run.sh; chmod 755 run.sh; mkdir d")
            given: list[tuple[str, Any]] = [
                ("new/deep/é.txt", POEM),
                ("run.sh", "echo\n"),
                ("d", "x"),
                ("e", None),
            ]
            told = []
            for path, text in given:
                told.append((await made.acall({"command": "create", "path": path, "text": text})).content)
            assert await sandbox.read("new/deep/é.txt") == POEM.encode()
            assert (await sandbox.exec("stat -c %a run.sh new/deep/é.txt")).stdout == "755\n644\n"
            return told

        assert play(body) == [
            "Wrote new/deep/é.txt: 4 lines.",
            "Replaced run.sh: 1 line.",
            "Error: d is a folder or no regular file",
            "Error: create needs text",
        ]


class TestReplace:
    def test_the_one_place(self, play: Run) -> None:
        told, files = calls(
            play,
            {"a": POEM, "b": "x\r\ny\r\nz", "c": "a\r\nb\n"},
            {"command": "replace", "path": "a", "old": "two\nthr", "new": "2\n3 thr"},
            {"command": "replace", "path": "b", "old": "x\ny", "new": "1\n2\n3"},
            {"command": "replace", "path": "c", "old": "a\r\nb", "new": "q"},
        )
        assert told[0].content == "Changed a:\n     1\tone\n     2\t2\n     3\t3 three\n     4\tfour"
        assert files == {"a": b"one\n2\n3 three\nfour\n", "b": b"1\r\n2\r\n3\r\nz", "c": b"q\n"}

    def test_several_places_are_told_and_nothing_is_changed(self, play: Run) -> None:
        told, files = calls(
            play,
            {"a": "x\ny\nx\naaa\n"},
            {"command": "replace", "path": "a", "old": "x", "new": "z"},
            {"command": "replace", "path": "a", "old": "aa", "new": "z"},
            {"command": "replace", "path": "a", "old": "  y", "new": "z"},
            {"command": "replace", "path": "a", "old": "nothing", "new": "z"},
            {"command": "replace", "path": "a", "old": "y", "new": "y"},
            {"command": "replace", "path": "a", "old": "", "new": "y"},
            {"command": "replace", "path": "a", "old": "y"},
        )
        assert [result.content.removeprefix("Error: ") for result in told] == [
            "old stands in a 2 times, beginning in the lines 1, 3; nothing was changed: add lines around the "
            "one you mean",
            "old stands in a 2 times, beginning in the lines 4, 4; nothing was changed: add lines around the "
            "one you mean",
            "old does not stand in a; its first words stand in line 2; nothing was changed: view the file "
            "and copy exactly",
            "old does not stand in a; nothing was changed: view the file and copy exactly",
            "old and new are the same; nothing was changed",
            "old is empty: say what to replace, or use insert",
            "replace needs new",
        ]
        assert files == {"a": b"x\ny\nx\naaa\n"}
        assert not any(result.ok for result in told)

    def test_all_of_it_and_too_much_of_it(self, play: Run) -> None:
        told, files = calls(
            play,
            {"a": "x"},
            {"command": "replace", "path": "a", "old": "x", "new": "y" * 100},
            {"command": "replace", "path": "a", "old": "x", "new": ""},
            max_bytes=50,
        )
        assert "would have 100 bytes" in told[0].content
        assert told[1].content == "Changed a: it is empty now."
        assert files == {"a": b""}


class TestInsert:
    def test_after_a_line(self, play: Run) -> None:
        told, files = calls(
            play,
            {"a": POEM, "b": "x\r\ny\r\n", "c": "no end", "d": ""},
            {"command": "insert", "path": "a", "line": 0, "text": "zero\n"},
            {"command": "insert", "path": "b", "line": 1, "text": "m\nn"},
            {"command": "insert", "path": "c", "line": 1, "text": "last\n"},
            {"command": "insert", "path": "d", "line": 0, "text": "first"},
            {"command": "insert", "path": "d", "line": 2, "text": "x"},
            {"command": "insert", "path": "d", "line": -1, "text": "x"},
            {"command": "insert", "path": "d", "text": "x"},
        )
        assert files == {
            "a": b"zero\none\ntwo\nthree\nfour\n",
            "b": b"x\r\nm\r\nn\r\ny\r\n",
            "c": b"no end\nlast",
            "d": b"first\n",
        }
        assert told[1].content == "Changed b:\n     1\tx\n     2\tm\n     3\tn\n     4\ty"
        assert [result.ok for result in told[4:]] == [False] * 3
        assert "d has 1 lines; text can come after line 0 to 1, not 2" in told[4].content


text = st.text(st.sampled_from("ab \n\r\té\x0c\u2028😀"), max_size=30)


@given(text, text, text)
def test_replacing_equals_the_plain_model(before: str, old: str, after: str) -> None:
    whole = before + old + after
    if old:
        assert places(whole, old) == [n for n in range(len(whole)) if whole.startswith(old, n)]
        assert len(before) in places(whole, old)


@given(text, text, st.integers(0, 40))
def test_inserting_equals_the_plain_model(before: str, new: str, line: int) -> None:
    lines = before.splitlines(keepends=True) if not set(before) & set("\r\x0c\u2028") else None
    if lines is None or line > len(lines):
        return
    ended = before.endswith("\n") or not before
    model = [one.removesuffix("\n") for one in lines]
    model[line:line] = new.removesuffix("\n").split("\n")
    assert inserted(before, line, new) == "\n".join(model) + "\n" * ended


@given(text)
def test_a_text_that_is_read_is_written_as_it_was(whole: str) -> None:
    for given_text in (whole, whole.replace("\r", "").replace("\n", "\r\n")):
        read = read_text(given_text.encode())
        assert read is not None
        assert read.data == given_text.encode()
        assert read.text.count("\n") == given_text.count("\n")


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(text, text, text, st.booleans(), st.integers(0, 4)), min_size=1, max_size=6))
def test_the_tool_equals_the_model(cases: list[tuple[str, str, str, bool, int]]) -> None:
    async def body() -> None:
        async with await make_backend("process", unsafe=True).start(SandboxSpec()) as sandbox:
            made = edit_tool(sandbox)
            for before, old, new, crlf, line in cases:
                # Line feeds alone, or carriage returns before all of them: the model is text with line feeds.
                whole, old, new = (part.replace("\r", "") for part in (before + old + before, old, new))
                end = "\r\n" if crlf else "\n"
                await sandbox.write("f", whole.replace("\n", end))
                found = [n for n in range(len(whole)) if old and whole.startswith(old, n)]
                told = await made.acall({"command": "replace", "path": "f", "old": old, "new": new})
                assert told.ok == (len(found) == 1 and old != new)
                if told.ok and "\n" in whole:
                    whole = whole[: found[0]] + new + whole[found[0] + len(old) :]
                    assert await sandbox.read("f") == whole.replace("\n", end).encode()
                await sandbox.write("f", whole.replace("\n", end))
                count = len(whole.split("\n")) - (whole.endswith("\n") or not whole)
                told = await made.acall({"command": "insert", "path": "f", "line": line, "text": new})
                assert told.ok == (line <= count)
                if told.ok and "\n" in whole:
                    assert await sandbox.read("f") == inserted(whole, line, new).replace("\n", end).encode()

    asyncio.run(body())


def test_a_sandbox_that_the_policy_ended_is_data(broken: Run) -> None:
    async def body(sandbox: Sandbox) -> ToolResult:
        return await make_tool("edit", sandbox=sandbox).acall({"command": "view", "path": "."})

    told = broken(body)
    assert not told.ok
    assert "the sandbox has ended" in told.content
