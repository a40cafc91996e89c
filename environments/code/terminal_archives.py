"""Shell tasks about archives: tar, gzip, zip, split files, backups.

Invariants: what is right is computed from the folder as it was made; an archive that a policy made is read
member by member and never unpacked.
"""

# ruff: noqa: D102 - what the methods of a task are for is said once, by Chore

from __future__ import annotations

import gzip
import hashlib
import io
import tarfile
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from agentgym.environments.code.terminal_chore import (
    MOST_BYTES,
    Chore,
    Done,
    Draw,
    Tree,
    Wrong,
    expect,
    folder_is,
    put,
    unchanged,
    words,
)


def packed(members: Mapping[str, bytes], *, squeeze: bool = False) -> bytes:
    """A tar archive with these files, the same bytes every time."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(data), 0o644
            archive.addfile(info, io.BytesIO(data))
    return gzip.compress(made.getvalue(), mtime=0) if squeeze else made.getvalue()


def members(data: bytes, what: str) -> dict[str, tuple[str, bytes]]:
    """Kinds and contents in a tar archive, gzipped or not, that a policy made.

    Raises:
        Wrong: It is none, or holds too much.
    """
    found: dict[str, tuple[str, bytes]] = {}
    try:
        if data[:2] == b"\x1f\x8b":
            with gzip.open(io.BytesIO(data)) as stream:
                data = stream.read(4 * MOST_BYTES + 1)
        expect(len(data) <= 4 * MOST_BYTES, f"{what} holds too much")
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
            for info in archive:
                kind = "file" if info.isreg() else "folder" if info.isdir() else "other"
                stream_of = archive.extractfile(info) if info.isreg() else None
                name = info.name[2:] if info.name.startswith("./") else info.name
                found[name] = kind, stream_of.read() if stream_of else b""
    except (tarfile.TarError, zlib.error, OSError, EOFError, ValueError) as error:
        raise Wrong(f"{what} is no archive that can be read") from error
    return found


class Nested(Chore):
    """An archive in an archive in an archive."""

    name = "archives-nested"
    difficulty = "easy"

    def plan(self, draw: Draw) -> None:
        self.depth = draw.between(4, 7)
        self.treasure = draw.one(WANTED)

    def asked(self) -> str:
        return words(f"""
            outer.tar.gz holds archives that hold archives: at each level there are files, and one or more
            of them are a tar archive, a gzipped tar archive or a gzipped file, whatever their names say.
            Somewhere in there is exactly one file called {self.treasure}. Write its content to
            {self.treasure} in the working directory, byte for byte.
        """)

    def lay(self, root: Path) -> None:
        draw = self.draw("lay")
        inside: dict[str, bytes] = {self.treasure: f"{draw.token(40)}\n".encode() * 3}
        for level in range(self.depth):
            for word in draw.words(3):
                inside[f"{word}.txt"] = f"{draw.prose(4)}\n".encode()
            inside[f"not-{self.treasure}"] = draw.token().encode()
            decoy = packed({f"{draw.one(WANTED)}.old": b"old"})
            box = packed(dict(draw.shuffled(sorted(inside.items()))), squeeze=draw.chance(0.5))
            if draw.chance(0.3):
                box = gzip.compress(box, mtime=0)
            inside = {
                f"{draw.one(('box', 'pack', 'blob'))}{level}.{draw.one(('tar', 'tgz', 'bin', 'gz'))}": box
            }
            inside[f"decoy{level}.tar"] = decoy
        put(root / "outer.tar.gz", packed(inside, squeeze=True))

    def oracle(self) -> list[str]:
        return [
            words(f"""
                mkdir tmp.d; cp outer.tar.gz tmp.d/start; cd tmp.d
                while [ -z "$(find . -name {self.treasure} -type f)" ]; do
                  for f in $(find . -type f ! -name '*.seen' | sort); do
                    if gzip -t "$f" 2> /dev/null; then zcat "$f" > "$f.out"; rm "$f"
                    elif tar tf "$f" > /dev/null 2>&1; then mkdir "$f.d"; tar xf "$f" -C "$f.d"; rm "$f"
                    else mv "$f" "$f.seen"; fi
                  done
                done
                cp "$(find . -name {self.treasure} -type f)" ../{self.treasure}; cd ..; rm -r tmp.d
            """)
        ]

    def check(self, before: Tree, after: Tree, done: Sequence[Done]) -> None:
        expect(after.data(self.treasure) == self._dig(before.data("outer.tar.gz")), "that is another content")

    def _dig(self, data: bytes) -> bytes:
        while data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
        if data[257:262] == b"ustar":
            for name, (_, inner) in members(data, "outer.tar.gz").items():
                if name == self.treasure:
                    return inner
                if found := self._dig(inner):
                    return found
        return b""


WANTED = ("treasure.txt", "ledger.csv", "license.key", "route.map")


class Package(Chore):
    """A tree is packed by rules."""

    name = "archives-package"

    def plan(self, draw: Draw) -> None:
        self.project = draw.one(("atlas", "borealis", "cirrus"))
        self.version = f"{draw.below(4)}.{draw.below(10)}.{draw.below(10)}"
        self.skip = draw.one(("*.tmp", "*.o", "*.log"))

    def asked(self) -> str:
        top = f"{self.project}-{self.version}"
        return words(f"""
            Pack the folder src into dist/{top}.tar.gz, a gzipped tar archive. Every member's path begins
            with "{top}/" in place of "src/". Left out are files that match {self.skip}, folders called
            build and all that is in them, in all depths; everything else is in it, files whose names begin
            with a dot too. Next to it write dist/{top}.tar.gz.sha256, which "sha256sum -c" accepts when it
            is run in dist. Do not change src.
        """)

    def lay(self, root: Path) -> None:
        draw = self.draw("lay")
        ending = self.skip[1:]
        for number in range(30):
            folder = draw.one(
                ("", "lib/", "lib/build/", "build/", "docs/build/deep/", "builders/", "docs/my pages/")
            )
            name = draw.one(
                (f"a{number}.c", f".hidden{number}", f"m{number}{ending}", f"n{number}{ending}.txt")
            )
            put(root / "src" / folder / name, draw.prose(6))
        put(root / "src/lib/build.txt", "a file, no folder\n")

    def oracle(self) -> list[str]:
        top = f"{self.project}-{self.version}"
        return [
            f"mkdir -p dist; tar --exclude='{self.skip}' --exclude='build' --transform='s,^src,{top},' "
            f"-czf dist/{top}.tar.gz src",
            f"cd dist; sha256sum {top}.tar.gz > {top}.tar.gz.sha256; cd ..",
        ]

    def check(self, before: Tree, after: Tree, done: Sequence[Done]) -> None:
        unchanged(before, after, "src")
        top = f"{self.project}-{self.version}"
        data = after.data(f"dist/{top}.tar.gz")
        expect(data[:2] == b"\x1f\x8b", "the archive is not gzipped")
        found = members(data, "the archive")
        wanted = {}
        for name, content in before.files("src").items():
            parts = name.split("/")
            if "build" not in parts[:-1] and not parts[-1].endswith(self.skip[1:]):
                wanted[f"{top}/{name}"] = content
        files = {name: content for name, (kind, content) in found.items() if kind == "file"}
        expect(files == wanted, "the archive does not hold the right files")
        rest = [name for name, (kind, _) in found.items() if kind != "file"]
        allowed = {
            top,
            *(f"{top}/{name}" for name, kind in before.entries("src").items() if kind == "folder"),
        }
        allowed = {name for name in allowed if "build" not in name.split("/")}
        expect(all(name in allowed for name in rest), "the archive holds more than it should")
        sums = after.lines(f"dist/{top}.tar.gz.sha256")
        digest = hashlib.sha256(data).hexdigest()
        expect(
            sums in ([f"{digest}  {top}.tar.gz"], [f"{digest} *{top}.tar.gz"]), "the checksum is not right"
        )


class Damaged(Chore):
    """Good archives are unpacked, damaged ones told apart."""

    name = "archives-damaged"

    def asked(self) -> str:
        return words("""
            backups/ holds gzipped tar archives (*.tar.gz). Some are damaged: cut off, not gzip at all, or
            with a checksum that does not match. Unpack each good one, NAME.tar.gz, into restored/NAME/, and
            write the file names of the damaged ones (such as x.tar.gz) to damaged.txt, one a line, in byte
            order. Nothing of a damaged archive is in restored/. Do not change backups/.
        """)

    def lay(self, root: Path) -> None:
        draw = self.draw("lay")
        for number, word in enumerate(draw.words(12)):
            inner = {f"{name}/{number}.txt": draw.prose(200).encode() for name in draw.words(3)}
            data = packed(inner, squeeze=True)
            fate = number if number < 4 else draw.below(7)
            if fate == 0:
                data = data[: len(data) * 2 // 3]
            elif fate == 1:
                data = b"PK" + data[2:]
            elif fate == 2:
                # The checksum at the end is of another content.
                data = data[:-8] + bytes([data[-8] ^ 255]) + data[-7:]
            put(root / "backups" / f"{word}.tar.gz", data)
        put(root / "backups/readme.txt", "weekly\n")

    def oracle(self) -> list[str]:
        return [
            words("""
                mkdir -p restored; : > bad.tmp
                for f in backups/*.tar.gz; do
                  n=$(basename "$f" .tar.gz)
                  if gzip -t "$f" 2> /dev/null && tar tzf "$f" > /dev/null 2>&1; then
                    mkdir "restored/$n"; tar xzf "$f" -C "restored/$n"
                  else echo "$n.tar.gz" >> bad.tmp; fi
                done
                LC_ALL=C sort bad.tmp > damaged.txt
            """)
        ]

    def check(self, before: Tree, after: Tree, done: Sequence[Done]) -> None:
        unchanged(before, after, "backups")
        bad, good = [], {}
        for name, data in before.files("backups").items():
            if name.endswith(".tar.gz"):
                try:
                    found = members(gzip.decompress(data), name)
                except (Wrong, zlib.error, OSError, EOFError):
                    bad.append(name)
                    continue
                for inside, (_, content) in found.items():
                    good[f"{name[:-7]}/{inside}"] = content
        expect(after.lines("damaged.txt") == sorted(bad), "damaged.txt is not right")
        folder_is(after, "restored", good)


class Zip(Chore):
    """One member of a zip archive is replaced, one goes."""

    name = "archives-zip"

    def plan(self, draw: Draw) -> None:
        self.member, self.gone = draw.some(("config.json", "notes.txt", "data/table.csv", "data/old.csv"), 2)

    def asked(self) -> str:
        return words(f"""
            bundle.zip is a zip archive. In it replace the content of the member {self.member} by that of
            the file replacement, and remove the member {self.gone}. All other members keep their names and
            contents, and the archive stays bundle.zip and has no member twice. There may be no zip program
            here; Python has the module zipfile.
        """)

    def lay(self, root: Path) -> None:
        draw = self.draw("lay")
        made = io.BytesIO()
        with zipfile.ZipFile(made, "w") as archive:
            for name in (
                "config.json",
                "notes.txt",
                "data/table.csv",
                "data/old.csv",
                "data/a b.txt",
                "z.bin",
            ):
                info = zipfile.ZipInfo(name, (2022, 1, 2, 3, 4, 6))
                info.compress_type = zipfile.ZIP_DEFLATED
                archive.writestr(info, draw.prose(30))
        put(root / "bundle.zip", made.getvalue())
        put(root / "replacement", f"{draw.token(32)}\n")

    def oracle(self) -> list[str]:
        return [
            words(f"""
                python3 - <<'END'
                import os, zipfile
                with zipfile.ZipFile("bundle.zip") as old, zipfile.ZipFile("new.zip", "w") as new:
                    for name in old.namelist():
                        if name == "{self.member}":
                            new.write("replacement", name)
                        elif name != "{self.gone}":
                            new.writestr(name, old.read(name))
                os.replace("new.zip", "bundle.zip")
                END
            """)
        ]

    def check(self, before: Tree, after: Tree, done: Sequence[Done]) -> None:
        wanted = self._contents(before.data("bundle.zip"))
        wanted[self.member] = before.data("replacement")
        del wanted[self.gone]
        expect(
            self._contents(after.data("bundle.zip")) == wanted, "bundle.zip does not hold the right members"
        )

    @staticmethod
    def _contents(data: bytes) -> dict[str, bytes]:
        found: dict[str, bytes] = {}
        try:
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                for info in archive.infolist():
                    expect(info.filename not in found, "a member is there twice")
                    expect(info.file_size <= MOST_BYTES, "a member is too large")
                    if not info.is_dir():
                        with archive.open(info) as stream:
                            found[info.filename] = stream.read(MOST_BYTES + 1)
        except (
            zipfile.BadZipFile,
            zlib.error,
            RuntimeError,
            EOFError,
            OSError,
        ) as error:
            raise Wrong("bundle.zip cannot be read") from error
        return found


class Increments(Chore):
    """A state is restored from a full backup and what followed."""

    name = "archives-increments"
    difficulty = "hard"

    def plan(self, draw: Draw) -> None:
        self.day = draw.between(4, 7)

    def asked(self) -> str:
        return words(f"""
            backup/ holds day-0.tar, a full backup of a folder, and for each later day N the archive
            day-N.tar with the files that were new or changed on that day, and the list day-N.deleted with
            the paths that were deleted on that day, one a line (a path may be a folder: then all in it was
            deleted). On each day files were deleted first and written then. Some days have no archive or no
            list: nothing was written, or nothing deleted. Restore the folder's files as they were at the
            end of day {self.day} into restored/. Do not change backup/.
        """)

    def lay(self, root: Path) -> None:
        draw = self.draw("lay")
        names = [f"{draw.one(('', 'a/', 'a/b/', 'c d/', 'e/'))}file{number}" for number in range(25)]
        now = {name: draw.prose(4).encode() for name in names[:18]}
        put(root / "backup/day-0.tar", packed(now))
        for day in range(1, 10):
            gone = draw.some(sorted(now), draw.below(4))
            if folders := sorted({name.rsplit("/", 1)[0] for name in now if "/" in name}):
                gone += [draw.one(folders)] if draw.chance(0.3) else []
            if draw.chance(0.8) and gone:
                put(root / "backup" / f"day-{day}.deleted", "".join(f"{name}\n" for name in gone))
                now = {n: data for n, data in now.items() if not _covered(n, gone)}
            if draw.chance(0.85):
                fresh = {name: draw.prose(4).encode() for name in draw.some(names, draw.between(1, 6))}
                now.update(fresh)
                put(root / "backup" / f"day-{day}.tar", packed(fresh))

    def oracle(self) -> list[str]:
        return [
            words(f"""
                mkdir restored; tar xf backup/day-0.tar -C restored
                for n in $(seq 1 {self.day}); do
                  if [ -f backup/day-$n.deleted ]; then
                    while IFS= read -r p; do rm -rf -- "restored/$p"; done < backup/day-$n.deleted
                  fi
                  if [ -f backup/day-$n.tar ]; then tar xf backup/day-$n.tar -C restored; fi
                done
            """)
        ]

    def check(self, before: Tree, after: Tree, done: Sequence[Done]) -> None:
        unchanged(before, after, "backup")
        now: dict[str, bytes] = {}
        for day in range(self.day + 1):
            if before.kind(f"backup/day-{day}.deleted") == "file":
                gone = before.lines(f"backup/day-{day}.deleted")
                now = {name: data for name, data in now.items() if not _covered(name, gone)}
            if before.kind(f"backup/day-{day}.tar") == "file":
                found = members(before.data(f"backup/day-{day}.tar"), "a backup")
                now.update({name: data for name, (_, data) in found.items()})
        folder_is(after, "restored", now)


def _covered(name: str, gone: Sequence[str]) -> bool:
    return any(name == path or name.startswith(path + "/") for path in gone)


class Parts(Chore):
    """Pieces are put together in the order that a list tells."""

    name = "archives-parts"
    difficulty = "easy"

    def plan(self, draw: Draw) -> None:
        self.target = draw.one(("image.raw", "dump.bin", "corpus.txt"))

    def asked(self) -> str:
        return words(f"""
            A gzipped file was cut into pieces, which lie in parts/ under meaningless names, among pieces of
            other files. manifest.txt lists the SHA-256 of each piece that is needed, in order, one a line
            (a piece may be needed more than once). Put the pieces together, decompress the result, and
            write it to {self.target}.
        """)

    def lay(self, root: Path) -> None:
        draw = self.draw("lay")
        # Blocks of one content, stored: pieces of equal bytes occur, and are needed more than once.
        data = ("".join(draw.token(64) for _ in range(40)) + "\n").encode()
        again = gzip.compress(b"again\n", mtime=0)
        whole = gzip.compress(data, mtime=0) + again * 2
        end = len(whole) - 2 * len(again)
        cuts = sorted({0, *(draw.below(end) for _ in range(12)), end, end + len(again), len(whole)})
        pieces = [whole[a:b] for a, b in pairwise(cuts)]
        put(root / "manifest.txt", "".join(hashlib.sha256(piece).hexdigest() + "\n" for piece in pieces))
        for piece in draw.shuffled(sorted({*pieces, *(draw.token(30).encode() for _ in range(8))})):
            put(root / "parts" / f"{draw.token(8)}.part", piece)

    def oracle(self) -> list[str]:
        return [
            "sha256sum parts/* > sums.tmp",
            'while read -r h; do cat "$(awk -v h="$h" \'$1 == h {print $2; exit}\' sums.tmp)"; '
            f"done < manifest.txt | zcat > {self.target}",
        ]

    def check(self, before: Tree, after: Tree, done: Sequence[Done]) -> None:
        pieces = {hashlib.sha256(data).hexdigest(): data for data in before.files("parts").values()}
        whole = b"".join(pieces[digest] for digest in before.lines("manifest.txt"))
        expect(after.data(self.target) == gzip.decompress(whole), f"{self.target} has another content")


CHORES: tuple[type[Chore], ...] = (Nested, Package, Damaged, Zip, Increments, Parts)
