"""Shell tasks about files: sizes, names, modes, copies, links.

Invariant: what is right is computed from the folder as it was made, in Python, never by the solution's way.
"""

# ruff: noqa: D102 - what the methods of a task are for is said once, by Chore

from __future__ import annotations

import hashlib
import os
import posixpath
import re
from collections.abc import Sequence
from pathlib import Path

from agentgym.environments.code.terminal_chore import (
    Chore,
    Done,
    Draw,
    Tree,
    expect,
    folder_is,
    put,
    unchanged,
    words,
)


def _forest(draw: Draw, root: Path, count: int, largest: int) -> None:
    """Files of drawn sizes in drawn folders, some with blanks in their names."""
    for number in range(count):
        depth = draw.below(4)
        parts = [draw.one(("", "old ", "")) + draw.one(("a", "b", "c", "notes", "x-1")) for _ in range(depth)]
        name = f"{draw.one(('data', 'log', 'my file', 'img'))}{number}.{draw.one(('txt', 'bin', 'dat'))}"
        put(root.joinpath(*parts, name), bytes([65 + number % 26]) * draw.between(1, largest))


class Largest(Chore):
    """The largest files of a tree."""

    name = "files-largest"
    difficulty = "easy"

    def plan(self, draw: Draw) -> None:
        self.count = draw.between(4, 9)
        self.folder = draw.one(WORDS_OF_FOLDERS)

    def asked(self) -> str:
        return words(f"""
            Find the {self.count} largest regular files under the folder {self.folder}, in all depths. Write
            them to largest.txt, one a line: the size in bytes, one blank, and the path beginning with
            "{self.folder}/". The largest comes first; files of one size are ordered by path, byte by byte.
            Names may contain blanks. Do not change anything under {self.folder}.
        """)

    def lay(self, root: Path) -> None:
        draw = self.draw("lay")
        _forest(draw, root / self.folder, 60, 9000)
        for twin in ("twin b", "twin a"):
            put(root / self.folder / twin, b"=" * 8990)

    def oracle(self) -> list[str]:
        return [
            f"find {self.folder} -type f -printf '%s %p\\n' | LC_ALL=C sort -k1,1nr -k2 | "
            f"head -n {self.count} > largest.txt"
        ]

    def check(self, before: Tree, after: Tree, done: Sequence[Done]) -> None:
        unchanged(before, after, self.folder)
        found = [(len(data), f"{self.folder}/{name}") for name, data in before.files(self.folder).items()]
        found.sort(key=lambda item: (-item[0], item[1].encode()))
        wanted = [f"{size} {name}" for size, name in found[: self.count]]
        expect(after.lines("largest.txt") == wanted, "largest.txt does not list the right files")


WORDS_OF_FOLDERS = ("archive", "projects", "storage", "depot", "records")


class Photos(Chore):
    """Names that hold a date become folders and shorter names."""

    name = "files-photos"

    def plan(self, draw: Draw) -> None:
        self.prefix = draw.one(("IMG", "DSC", "PXL"))

    def asked(self) -> str:
        return words(f"""
            The folder camera holds pictures called {self.prefix}_YYYYMMDD_NNNN.EXT, where EXT is jpg, JPG,
            jpeg or JPEG. Move each of them to album/YYYY/MM/DD-NNNN.jpg (the same content, the extension
            always "jpg" in lower case), making the folders that are needed. Files in camera with any other
            form of name stay where they are, and album holds nothing else.
        """)

    def lay(self, root: Path) -> None:
        draw = self.draw("lay")
        for number in draw.some(range(1, 900), 40):
            day = f"{draw.between(2018, 2023)}{draw.between(1, 12):02}{draw.between(1, 28):02}"
            ending = draw.one(("jpg", "JPG", "jpeg", "JPEG"))
            put(root / "camera" / f"{self.prefix}_{day}_{number:04}.{ending}", f"picture {draw.token()}\n")
        for other in (
            f"{self.prefix}_2020_0001.jpg",
            f"{self.prefix}_20200101_0001.png",
            "MOV_20200101_0002.jpg",
        ):
            put(root / "camera" / other, f"other {draw.token()}\n")

    def oracle(self) -> list[str]:
        return [
            words(rf"""
                (cd camera && for f in *; do
                  form='^{self.prefix}_([0-9]{{4}})([0-9]{{2}})([0-9]{{2}})_([0-9]{{4}})\.(jpe?g|JPE?G)$'
                  if [[ "$f" =~ $form ]]; then
                    d="../album/${{BASH_REMATCH[1]}}/${{BASH_REMATCH[2]}}"
                    mkdir -p "$d" && mv "$f" "$d/${{BASH_REMATCH[3]}}-${{BASH_REMATCH[4]}}.jpg"
                  fi
                done)
            """)
        ]

    def check(self, before: Tree, after: Tree, done: Sequence[Done]) -> None:
        form = re.compile(rf"{self.prefix}_(\d{{4}})(\d\d)(\d\d)_(\d{{4}})\.(?:jpe?g|JPE?G)")
        stay, go = {}, {}
        for name, data in before.files("camera").items():
            if read := form.fullmatch(name):
                go["{}/{}/{}-{}.jpg".format(*read.groups())] = data
            else:
                stay[name] = data
        folder_is(after, "camera", stay)
        folder_is(after, "album", go)


class Twins(Chore):
    """Files of one content are kept once."""

    name = "files-twins"

    def plan(self, draw: Draw) -> None:
        self.folder = draw.one(("downloads", "music", "papers"))

    def asked(self) -> str:
        return words(f"""
            Under {self.folder} (in all depths) several files have exactly the same content. Of each set of
            files with one content keep the one whose path comes first in byte order (LC_ALL=C), and delete
            the others. Empty files are never deleted. Write the paths of all deleted files, each beginning
            with "{self.folder}/", to deleted.txt, one a line, in byte order. Names may contain blanks.
            Folders stay.
        """)

    def lay(self, root: Path) -> None:
        draw = self.draw("lay")
        contents = [f"{draw.prose(draw.between(1, 40))}\n" for _ in range(16)]
        # The same size and another content: size alone does not tell.
        contents += [contents[0].swapcase(), contents[1].swapcase()]
        for number in range(48):
            folder = draw.one(("", "2021", "2021/old one", "Backup", "tmp"))
            name = f"{draw.one(('track', 'paper', 'new file'))} {number:02}"
            put(root / self.folder / folder / name, draw.one(contents))
        for name in ("empty1", "tmp/empty2"):
            put(root / self.folder / name, b"")

    def oracle(self) -> list[str]:
        return [
            f"find {self.folder} -type f -size +0 -print0 | LC_ALL=C sort -z | xargs -0 sha256sum | "
            "awk '{h=$1; sub(/^[^ ]+  /, \"\"); if (h in seen) print; seen[h]=1}' > deleted.txt",
            'while IFS= read -r f; do rm -- "$f"; done < deleted.txt',
        ]

    def check(self, before: Tree, after: Tree, done: Sequence[Done]) -> None:
        kept: dict[str, bytes] = {}
        deleted: list[str] = []
        seen: set[bytes] = set()
        files = before.files(self.folder)
        for name in sorted(files, key=lambda name: name.encode()):
            digest = hashlib.sha256(files[name]).digest()
            if files[name] and digest in seen:
                deleted.append(f"{self.folder}/{name}")
            else:
                kept[name] = files[name]
            seen.add(digest)
        folder_is(after, self.folder, kept)
        expect(after.lines("deleted.txt") == deleted, "deleted.txt does not list the right files")


class Modes(Chore):
    """Permission bits by kind of file."""

    name = "files-modes"

    def plan(self, draw: Draw) -> None:
        self.folder = draw.one(("deploy", "release", "server"))
        self.ending = draw.one(("key", "pem", "secret"))

    def asked(self) -> str:
        return words(f"""
            Set the permission bits of every regular file under {self.folder}, in all depths:
            - 600 for files whose name ends in ".{self.ending}", whatever they hold;
            - 755 for other files whose first two bytes are "#!";
            - 640 for other files whose name begins with a dot;
            - 644 for all others.
            Do not change contents, names or folders.
        """)

    def lay(self, root: Path) -> None:
        draw = self.draw("lay")
        for number in range(36):
            folder = draw.one(("", "bin", "etc/conf d", "lib"))
            script = draw.chance(0.4)
            name = draw.one(("run", "tool", ".rc", "note")) + str(number)
            name += draw.one(("", ".sh", ".txt", f".{self.ending}", ".cfg"))
            text = "#!/bin/sh\n" if script else draw.one(("plain", "# !no\n", " #!/bin/sh\n"))
            put(
                root / self.folder / folder / name,
                text + draw.token(),
                draw.one((0o600, 0o640, 0o644, 0o755)),
            )

    def oracle(self) -> list[str]:
        return [
            words(f"""
                find {self.folder} -type f -print0 | while IFS= read -r -d '' f; do
                  n=${{f##*/}}; m=644
                  case "$n" in .*) m=640;; esac
                  if [ "$(head -c 2 -- "$f" | tr -d '\\0')" = '#!' ]; then m=755; fi
                  case "$n" in *.{self.ending}) m=600;; esac
                  chmod "$m" -- "$f"
                done
            """)
        ]

    def check(self, before: Tree, after: Tree, done: Sequence[Done]) -> None:
        unchanged(before, after, self.folder)
        for name, data in before.files(self.folder).items():
            base = posixpath.basename(name)
            wanted = 0o640 if base.startswith(".") else 0o644
            if data.startswith(b"#!"):
                wanted = 0o755
            if base.endswith("." + self.ending):
                wanted = 0o600
            expect(after.mode(f"{self.folder}/{name}") == wanted, f"the mode of {name} is not as asked")


class Mirror(Chore):
    """One folder is made like another, but for what is protected."""

    name = "files-mirror"

    def plan(self, draw: Draw) -> None:
        self.source, self.target = draw.some(("master", "live", "left", "right", "origin"), 2)

    def asked(self) -> str:
        return words(f"""
            Make the folder {self.target} a mirror of the folder {self.source}: every regular file of
            {self.source}, in all depths, is in {self.target} under the same relative path with the same
            content, and {self.target} holds no other regular files. Two exceptions: files in {self.target}
            whose relative path is listed in protected.txt (one a line) stay exactly as they are, even where
            {self.source} has another content for them or does not have them; and files of {self.source} that
            end in ".tmp" count as if they were not there. Do not change {self.source} or protected.txt.
        """)

    def lay(self, root: Path) -> None:
        draw = self.draw("lay")
        names = [f"{draw.one(('', 'sub/', 'sub/deep dir/', 'z/'))}file {number}" for number in range(40)]
        names += [f"{draw.one(('', 'sub/'))}scratch{number}.tmp" for number in range(4)]
        protected = []
        for name in names:
            text = draw.prose(5)
            where = draw.below(4)
            if where != 0:
                put(root / self.source / name, text)
            if where != 1:
                put(root / self.target / name, text if where == 2 else draw.prose(5))
                if draw.chance(0.2):
                    protected.append(name)
        put(root / "protected.txt", "".join(f"{name}\n" for name in draw.shuffled(protected)))
        put(root / self.source / "late", "not there yet\n")

    def oracle(self) -> list[str]:
        return [
            words(f"""
                (cd {self.target} && find . -type f -printf '%P\\n') | grep -vxFf protected.txt |
                while IFS= read -r f; do rm -- "{self.target}/$f"; done
                (cd {self.source} && find . -type f ! -name '*.tmp' -printf '%P\\n') |
                grep -vxFf protected.txt > todo.list
                while IFS= read -r f; do
                  mkdir -p "{self.target}/$(dirname -- "$f")" && cp -- "{self.source}/$f" "{self.target}/$f"
                done < todo.list
            """)
        ]

    def check(self, before: Tree, after: Tree, done: Sequence[Done]) -> None:
        unchanged(before, after, self.source, "protected.txt")
        protected = set(before.lines("protected.txt"))
        source, target = before.files(self.source), before.files(self.target)
        wanted = {
            name: data for name, data in source.items() if not name.endswith(".tmp") and name not in protected
        }
        wanted.update({name: data for name, data in target.items() if name in protected})
        folder_is(after, self.target, wanted)


class Quarantine(Chore):
    """A list of checksums sorts files into good, damaged and missing."""

    name = "files-quarantine"

    def plan(self, draw: Draw) -> None:
        self.kind = draw.one(("sha256", "md5", "sha1"))

    def asked(self) -> str:
        return words(f"""
            The file parcel/SUMS lists {self.kind} checksums of the files in parcel, in the format of
            {self.kind}sum (the names are relative to parcel). Move every listed file whose content does not
            have its checksum to the folder quarantine, under the same relative path. Write the names of
            listed files that are not in parcel to missing.txt, and the names of files in parcel that are
            not listed (other than SUMS itself) to unlisted.txt; both one name a line, relative to parcel,
            sorted in byte order. Everything else in parcel stays as it is.
        """)

    def lay(self, root: Path) -> None:
        draw = self.draw("lay")
        sums = []
        for number in range(40):
            name = f"{draw.one(('', 'a/', 'a/b c/'))}part-{number:02}.{draw.one(('dat', 'txt'))}"
            data = draw.prose(draw.between(3, 60)).encode()
            fate = draw.below(6)
            if fate != 5:
                sums.append(f"{hashlib.new(self.kind, data).hexdigest()}  {name}\n")
            if fate == 4:
                data = data[:-1] + b"!"
            if fate != 3:
                put(root / "parcel" / name, data)
        put(root / "parcel/damaged", b"damaged")
        sums.append(f"{hashlib.new(self.kind, b'whole').hexdigest()}  damaged\n")
        put(root / "parcel/SUMS", "".join(draw.shuffled(sums)))

    def oracle(self) -> list[str]:
        return [
            "mkdir -p quarantine; sed -E 's/^[0-9a-f]+  //' parcel/SUMS | LC_ALL=C sort > listed.tmp; "
            "find parcel -type f ! -path parcel/SUMS -printf '%P\\n' | LC_ALL=C sort > there.tmp",
            "LC_ALL=C comm -23 listed.tmp there.tmp > missing.txt; "
            "LC_ALL=C comm -13 listed.tmp there.tmp > unlisted.txt",
            words(f"""
                while IFS= read -r line; do
                  f=${{line#*  }}
                  p="parcel/$f"
                  if [ -f "$p" ] && [ "$({self.kind}sum < "$p" | cut -d' ' -f1)" != "${{line%%  *}}" ]; then
                    mkdir -p "quarantine/$(dirname "$f")"; mv "$p" "quarantine/$f"
                  fi
                done < parcel/SUMS
            """),
        ]

    def check(self, before: Tree, after: Tree, done: Sequence[Done]) -> None:
        files = before.files("parcel")
        listed = {}
        for line in before.lines("parcel/SUMS"):
            digest, _, name = line.partition("  ")
            listed[name] = digest
        bad = {
            name: data
            for name, data in files.items()
            if name in listed and hashlib.new(self.kind, data).hexdigest() != listed[name]
        }
        folder_is(after, "quarantine", bad)
        folder_is(after, "parcel", {name: data for name, data in files.items() if name not in bad})
        unlisted = sorted(files.keys() - listed.keys() - {"SUMS"}, key=str.encode)
        expect(after.lines("unlisted.txt") == unlisted, "unlisted.txt is not right")
        missing = sorted(listed.keys() - files.keys(), key=str.encode)
        expect(after.lines("missing.txt") == missing, "missing.txt is not right")


class Releases(Chore):
    """The newest versions stay, and a link names the newest."""

    name = "files-releases"

    def plan(self, draw: Draw) -> None:
        self.keep = draw.between(2, 4)
        self.link = draw.one(("current", "latest", "stable"))

    def asked(self) -> str:
        return words(f"""
            The folder releases holds one folder for each version, called vMAJOR.MINOR.PATCH (numbers, so
            v1.10.0 is newer than v1.9.3), and some folders with other names. Keep the {self.keep} newest
            versions and delete the folders of all older ones; what has another name stays. Then make
            releases/{self.link} a relative symbolic link to the newest version's folder (its target is just
            that folder's name); what is called releases/{self.link} now may go.
        """)

    def lay(self, root: Path) -> None:
        draw = self.draw("lay")
        for version in self._versions(draw):
            put(root / "releases" / "v{}.{}.{}".format(*version) / "app.txt", draw.token())
        for other in ("nightly", "v2-beta", "v9.9"):
            put(root / "releases" / other / "app.txt", draw.token())
        os.symlink("nightly", root / "releases" / self.link)

    @staticmethod
    def _versions(draw: Draw) -> list[tuple[int, int, int]]:
        found = {
            (draw.between(1, 2), draw.one((1, 2, 9, 10, 11)), draw.one((0, 3, 9, 10, 12))) for _ in range(14)
        }
        return draw.shuffled(sorted(found | {(2, 9, 9), (2, 10, 0)}))

    def oracle(self) -> list[str]:
        return [
            "ls releases | grep -xE 'v[0-9]+\\.[0-9]+\\.[0-9]+' | sort -V > order.tmp",
            f"head -n -{self.keep} order.tmp | sed 's,^,releases/,' | xargs -r rm -r",
            f'rm -f releases/{self.link}; ln -s "$(tail -n 1 order.tmp)" releases/{self.link}',
        ]

    def check(self, before: Tree, after: Tree, done: Sequence[Done]) -> None:
        form = re.compile(r"v(\d+)\.(\d+)\.(\d+)")
        names = {name.split("/")[0] for name in before.files("releases")}
        versions = sorted(
            (tuple(map(int, read.groups())), read.group()) for name in names if (read := form.fullmatch(name))
        )
        gone = {name for _, name in versions[: -self.keep]}
        wanted = {
            name: data for name, data in before.files("releases").items() if name.split("/")[0] not in gone
        }
        expect(after.files("releases") == wanted, "releases does not hold the right files")
        expect(not gone & after.entries("releases").keys(), "a folder of an old version is still there")
        expect(
            after.link(f"releases/{self.link}") == versions[-1][1],
            "the link does not name the newest version",
        )


CHORES: tuple[type[Chore], ...] = (Largest, Photos, Twins, Modes, Mirror, Quarantine, Releases)
