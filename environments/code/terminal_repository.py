"""Git repositories of shell tasks: made commit by commit, and read of what a policy left.

Invariants: histories are the same to the last hash every time they are made; of a repository that a policy
left only objects, branches and tags are taken, into a clean one, so that neither its configuration nor its
hooks ever run, and an object that is not what its name says is none.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import tempfile
import zlib
from collections.abc import Mapping
from pathlib import Path

from agentgym.environments.code.terminal_chore import MOST_BYTES, Tree, Wrong, expect, put

PEOPLE = (
    ("Ada Brook", "ada@example.org"),
    ("Ben Castle", "ben@example.org"),
    ("Chi Dinh", "chi@example.org"),
    ("Dora Evans", "dora@example.org"),
)
START = 1_680_000_000


def git(place: Path, *arguments: str, given: bytes = b"") -> bytes:
    """What a git command prints, without anybody's configuration.

    Raises:
        subprocess.CalledProcessError: It fails.
    """
    env = {"PATH": os.environ["PATH"], "HOME": str(place), "LC_ALL": "C", "GIT_CONFIG_NOSYSTEM": "1"}
    env["GIT_CONFIG_GLOBAL"] = os.devnull
    ran = subprocess.run(
        ["git", *arguments], cwd=place, env=env, input=given, capture_output=True, check=True, timeout=60
    )
    return ran.stdout


class Story:
    """A history, told commit by commit."""

    def __init__(self) -> None:
        self._stream: list[bytes] = []
        self._tips: dict[str, int] = {}
        self._marks = 0

    def commit(
        self,
        branch: str,
        message: str,
        files: Mapping[str, str | None],
        who: tuple[str, str] = PEOPLE[0],
        merge: str = "",
    ) -> int:
        """Add a commit to a branch; ``None`` deletes a file. Returns its mark."""
        self._marks += 1
        when = f"{who[0]} <{who[1]}> {START + 3600 * self._marks} +0000"
        self._say(f"commit refs/heads/{branch}\nmark :{self._marks}\nauthor {when}\ncommitter {when}\n")
        self._data(message)
        if branch in self._tips:
            self._say(f"from :{self._tips[branch]}\n")
        if merge:
            self._say(f"merge :{self._tips[merge]}\n")
        for name, content in files.items():
            if content is None:
                self._say(f"D {name}\n")
            else:
                self._say(f"M 100644 inline {name}\n")
                self._data(content)
        self._say("\n")
        self._tips[branch] = self._marks
        return self._marks

    def branch(self, name: str, at: int) -> None:
        """Start a branch at a mark."""
        self._say(f"reset refs/heads/{name}\nfrom :{at}\n\n")
        self._tips[name] = at

    def tell(self, place: Path) -> None:
        """Make the repository, with ``main`` checked out."""
        place.mkdir(parents=True)
        git(place, "init", "-q", "--template=")
        git(place, "symbolic-ref", "HEAD", "refs/heads/main")
        for key, value in (
            ("user.name", "You"),
            ("user.email", "you@example.org"),
            ("gc.auto", "0"),
            ("advice.detachedHead", "false"),
        ):
            git(place, "config", key, value)
        git(place, "fast-import", "--quiet", given=b"".join(self._stream))
        git(place, "checkout", "-q", "-f", "main")

    def _say(self, text: str) -> None:
        self._stream.append(text.encode())

    def _data(self, text: str) -> None:
        self._say(f"data {len(text.encode())}\n{text}\n")


class Repository:
    """The objects, branches and tags of a repository that a policy left, in a clean one.

    Args:
        tree: Where it lies.
        name: Its folder.

    Raises:
        Wrong: It is no repository, or one that cannot be read.
    """

    def __init__(self, tree: Tree, name: str) -> None:
        self.place = Path(tempfile.mkdtemp())
        git(self.place, "init", "-q", "--bare", "--template=")
        inside = f"{name}/.git"
        self.objects: set[str] = set()
        for entry, kind in tree.entries(f"{inside}/objects").items():
            if kind == "file" and re.fullmatch("[0-9a-f]{2}/[0-9a-f]{38}", entry):
                self._take(entry, tree.data(f"{inside}/objects/{entry}"))
            elif kind == "file" and re.fullmatch(r"pack/pack-[0-9a-f]{40}\.pack", entry):
                self._run("index-pack", "--stdin", given=tree.data(f"{inside}/objects/{entry}"))
        listed = self._run("cat-file", "--batch-all-objects", "--batch-check=%(objectname)")
        self.objects = set(listed.split())
        self.refs = self._refs(tree, inside)
        self.head = tree.text(f"{inside}/HEAD").strip()

    def tip(self, ref: str) -> str:
        """The commit of a branch.

        Raises:
            Wrong: There is no such branch.
        """
        full = f"refs/heads/{ref}"
        expect(full in self.refs, f"there is no branch {ref}")
        return self.commit(self.refs[full])

    def commit(self, name: str) -> str:
        """The commit of a hash, which may be a tag's."""
        return self._run("rev-parse", "--verify", f"{name}^{{commit}}").strip()

    def line(self, tip: str, *options: str) -> list[str]:
        """Commits that can be reached, oldest first."""
        return self._run("rev-list", "--topo-order", "--reverse", *options, tip, "--").split()

    def told(self, commit: str, form: str) -> str:
        """A commit in the words of ``git log --format``."""
        return self._run("log", "-1", f"--format={form}", commit, "--").rstrip("\n")

    def files(self, commit: str) -> dict[str, str]:
        """Blobs of a commit by path; a mode other than a plain file's is told before the hash."""
        found = {}
        for row in self._run("ls-tree", "-r", "-z", commit).split("\0")[:-1]:
            facts, _, name = row.partition("\t")
            mode, _, blob = facts.split()
            found[name] = blob if mode == "100644" else f"{mode} {blob}"
        return found

    def blob(self, name: str) -> bytes:
        """Content of a blob."""
        return git(self.place, "cat-file", "blob", name)

    def _take(self, entry: str, packed: bytes) -> None:
        unpacker = zlib.decompressobj()
        try:
            data = unpacker.decompress(packed, MOST_BYTES)
        except zlib.error as error:
            raise Wrong("an object of the repository is damaged") from error
        true = hashlib.sha1(data).hexdigest() == entry.replace("/", "")
        expect(true and unpacker.eof, "an object of the repository is not what its name says")
        put(self.place / "objects" / entry, packed)

    def _refs(self, tree: Tree, inside: str) -> dict[str, str]:
        found = {}
        if tree.kind(f"{inside}/packed-refs") == "file":
            for line in tree.lines(f"{inside}/packed-refs"):
                if read := re.fullmatch("([0-9a-f]{40}) (refs/.+)", line):
                    found[read[2]] = read[1]
        for name, kind in tree.entries(f"{inside}/refs").items():
            if kind == "file":
                text = tree.text(f"{inside}/refs/{name}").strip()
                if re.fullmatch("[0-9a-f]{40}", text):
                    found[f"refs/{name}"] = text
        return found

    def _run(self, *arguments: str, given: bytes = b"") -> str:
        try:
            return git(self.place, *arguments, given=given).decode("utf-8", "surrogateescape")
        except subprocess.CalledProcessError as error:
            raise Wrong("the repository cannot be read") from error
