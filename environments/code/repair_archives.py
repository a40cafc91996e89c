"""Archives of a package index: found, fetched, held to their hashes, and unpacked without running anything.

Invariants: an archive is used only if it hashes to what is recorded; nothing that it holds is executed here,
its metadata are not built, and only regular files are unpacked, below the folder that was named.

The index is the one that pip is configured for. pip itself builds the metadata of a source archive when it
is asked to download one, which runs code of the archive: so they are fetched here, by the links of the
index's page (PEP 503).
"""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
import tarfile
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path, PurePosixPath

from agentgym import datasets, paths
from agentgym.errors import DataUnavailable

MAX_BYTES = 64 << 20
"""Most bytes that one archive may hold, unpacked."""

MAX_FILES = 5_000
"""Most files that one archive may hold."""

_PAGE = 32 << 20


@dataclass(frozen=True, slots=True)
class Archive:
    """A file of the index.

    Attributes:
        package: Whose it is.
        name: The file's name.
        sha256: What it hashes to.
    """

    package: str
    name: str
    sha256: str


class Index:
    """The package index.

    Args:
        folder: A folder that holds the archives, in place of the network.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._pages: dict[str, dict[str, str]] = {}

    def fetch(self, archive: Archive) -> Path:
        """The archive's file, checked; kept in the cache by its hash.

        Raises:
            DataUnavailable: It cannot be fetched, or is another file.
        """
        if self._folder is not None:
            found = self._folder / archive.name
            if not found.is_file():
                raise DataUnavailable(
                    f"{archive.name} is not in {self._folder}", hint="leave --from out to fetch it"
                )
            datasets.verify(found, archive.sha256)
            return found
        target = paths.cache_dir("archives") / archive.sha256 / archive.name
        if target.is_file():
            datasets.verify(target, archive.sha256)
            return target
        link = self.links(archive.package).get(archive.name)
        if link is None:
            raise DataUnavailable(
                f"the index has no {archive.name} of {archive.package}",
                hint="check pip's index-url, or give --from FOLDER with the archives",
            )
        with paths.atomic_write(target) as made:
            datasets.download(link.partition("#")[0], made, archive.sha256, lambda done, total: None)
        return target

    def links(self, package: str) -> dict[str, str]:
        """The address of every file of a package by the file's name, its hash behind the ``#``.

        Raises:
            DataUnavailable: The page cannot be had.
        """
        name = re.sub(r"[-_.]+", "-", package).lower()
        if name not in self._pages:
            address = f"{_index_url().rstrip('/')}/{name}/"
            request = urllib.request.Request(address, headers={"Accept": "text/html"})
            try:
                with urllib.request.urlopen(request, timeout=datasets.SECONDS) as response:
                    page = response.read(_PAGE).decode("utf-8", "replace")
            except (OSError, urllib.error.URLError) as error:
                raise DataUnavailable(
                    f"cannot read the index's page of {package}: {error}",
                    hint="check the network and pip's index-url, or give --from FOLDER with the archives",
                ) from error
            parser = _Links()
            parser.feed(page)
            self._pages[name] = {
                urllib.parse.unquote(PurePosixPath(urllib.parse.urlsplit(link).path).name): (
                    urllib.parse.urljoin(address, link)
                )
                for link in parser.found
            }
        return self._pages[name]

    def archive(self, package: str, name: str) -> Archive:
        """A file as the index names it, with the hash that the index gives.

        Raises:
            DataUnavailable: The index has no such file, or gives no SHA-256 of it.
        """
        link = self.links(package).get(name, "")
        match = re.search(r"#(?:.*&)?sha256=([0-9a-f]{64})", link)
        if match is None:
            raise DataUnavailable(f"the index has no {name} of {package} with a SHA-256")
        return Archive(package, name, match[1])

    def source(self, package: str, version: str) -> Archive:
        """The source archive of a version.

        Raises:
            DataUnavailable: There is none.
        """
        stem = re.sub(r"[-_.]+", "-", f"{package}-{version}").lower()
        for name in self.links(package):
            for ending in (".tar.gz", ".zip", ".tar.bz2"):
                if re.sub(r"[-_.]+", "-", name.removesuffix(ending)).lower() == stem and name.endswith(
                    ending
                ):
                    return self.archive(package, name)
        raise DataUnavailable(f"the index has no source archive of {package} {version}")


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        link = dict(attrs).get("href")
        if tag == "a" and link:
            self.found.append(link)


def unpack(archive: Path, into: Path, *, strip: bool) -> int:
    """Unpack the regular files of an archive.

    Args:
        archive: A wheel, a zip file or a tar file.
        into: Where they go.
        strip: Whether the folder that all its members lie in is left out.

    Returns:
        Number of files.

    Raises:
        DataUnavailable: It is damaged, too large, or has a name that leads outside.
    """
    count = size = 0
    try:
        for name, mode, content in _members(archive):
            parts = PurePosixPath(name).parts[1 if strip else 0 :]
            if PurePosixPath(name).is_absolute() or ".." in parts or "\0" in name:
                raise DataUnavailable(f"{archive.name} holds a file that would land outside: {name!r}")
            if not parts:
                continue
            count, size = count + 1, size + len(content)
            if count > MAX_FILES or size > MAX_BYTES:
                raise DataUnavailable(
                    f"{archive.name} holds more than {MAX_FILES} files or {MAX_BYTES >> 20} MiB"
                )
            target = into.joinpath(*parts)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
            target.chmod(0o755 if mode & stat.S_IXUSR else 0o644)
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError, ValueError) as error:
        raise DataUnavailable(f"{archive.name} cannot be unpacked: {error}") from error
    return count


def _members(archive: Path) -> Iterator[tuple[str, int, bytes]]:
    """Name, mode and content of the regular files."""
    if archive.suffix in (".zip", ".whl"):
        with zipfile.ZipFile(archive) as zipped:
            for info in zipped.infolist():
                mode = info.external_attr >> 16
                if info.is_dir() or (mode and not stat.S_ISREG(mode) and stat.S_IFMT(mode)):
                    continue
                _hold(archive, info.file_size)
                yield info.filename, mode, zipped.read(info)
        return
    with tarfile.open(archive, "r:*") as tarred:
        for member in tarred:
            # Links, devices and pipes are left out; a link to a file of the same archive is its content.
            if member.isreg():
                _hold(archive, member.size)
                stream = tarred.extractfile(member)
                assert stream is not None
                yield member.name, member.mode, stream.read()


def _hold(archive: Path, size: int) -> None:
    if size > MAX_BYTES:
        raise DataUnavailable(f"{archive.name} holds a file of {size} bytes, more than {MAX_BYTES}")


def _index_url() -> str:
    """The index that pip uses: what the environment says, what its configuration says, or its own default."""
    if told := os.environ.get("PIP_INDEX_URL"):
        return told
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", "config", "list"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    ).stdout
    for key in ("download", "install", "global"):
        if match := re.search(rf"^{key}\.index-url='(.*)'$", listed, re.M):
            return match[1]
    return "https://pypi.org/simple"
