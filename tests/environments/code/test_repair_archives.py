"""Archives of an index: found by its page, held to their hashes, unpacked without running anything."""

from __future__ import annotations

import hashlib
import http.server
import io
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from agentgym.environments.code import repair_archives
from agentgym.environments.code.repair_archives import Archive, Index, unpack
from agentgym.errors import DataUnavailable

CONTENT = b"what it holds"
SHA256 = hashlib.sha256(CONTENT).hexdigest()
PAGE = f"""<!DOCTYPE html><html><body>
<a href="../../files/some_pkg-1.0.tar.gz#sha256={SHA256}" data-x="&gt;">some_pkg-1.0.tar.gz</a>
<a href="/files/some_pkg-1.0-py3-none-any.whl#sha256={"0" * 64}">a wheel</a>
<a href="/files/some_pkg-1.1.zip">no hash</a><a name="here">no link</a>
</body></html>"""


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    """An index that pip's environment names."""
    served = tmp_path / "served"
    for name, content in (
        ("simple/some-pkg/index.html", PAGE.encode()),
        ("files/some_pkg-1.0.tar.gz", CONTENT),
        ("files/some_pkg-1.0-py3-none-any.whl", CONTENT),
    ):
        (served / name).parent.mkdir(parents=True, exist_ok=True)
        (served / name).write_bytes(content)

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: object) -> None:
            super().__init__(*args, directory=str(served))  # type: ignore[arg-type]

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/simple")
    monkeypatch.setenv("AGENTGYM_CACHE", str(tmp_path / "cache"))
    yield Index()
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_source_archive_is_found_fetched_and_kept(index: Index, tmp_path: Path) -> None:
    archive = index.source("Some.Pkg", "1.0")
    assert (archive.name, archive.sha256) == ("some_pkg-1.0.tar.gz", SHA256)
    place = index.fetch(archive)
    assert place.read_bytes() == CONTENT and place.is_relative_to(tmp_path / "cache")
    (tmp_path / "served" / "files" / archive.name).unlink()
    assert Index().fetch(archive) == place
    place.write_bytes(b"damaged")
    with pytest.raises(DataUnavailable, match="hashes to"):
        index.fetch(archive)


def test_another_file_than_the_recorded_one_is_refused(index: Index, tmp_path: Path) -> None:
    with pytest.raises(DataUnavailable, match="hashes to"):
        index.fetch(Archive("some-pkg", "some_pkg-1.0-py3-none-any.whl", "0" * 64))
    assert not list((tmp_path / "cache").rglob("*.whl"))


def test_what_the_index_has_not_is_told(index: Index) -> None:
    for version in ("2.0", "1.1"):
        with pytest.raises(DataUnavailable, match=r"no source archive|with a SHA-256"):
            index.source("some-pkg", version)
    with pytest.raises(DataUnavailable, match="the index has no"):
        index.fetch(Archive("some-pkg", "other.zip", SHA256))
    with pytest.raises(DataUnavailable, match="cannot read the index's page"):
        index.links("nobody")


def test_a_folder_stands_for_the_index(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(CONTENT)
    assert Index(tmp_path).fetch(Archive("a", "a.zip", SHA256)) == tmp_path / "a.zip"
    with pytest.raises(DataUnavailable, match="hashes to"):
        Index(tmp_path).fetch(Archive("a", "a.zip", "1" * 64))
    with pytest.raises(DataUnavailable, match="is not in"):
        Index(tmp_path).fetch(Archive("a", "b.zip", SHA256))


def test_pip_is_asked_for_its_index(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_INDEX_URL", raising=False)
    assert repair_archives._index_url().startswith("http")


# Unpacking ----------------------------------------------------------------------------------


def tar(place: Path, *members: tuple[str, bytes | str, int]) -> Path:
    """A tar file of files, and of links where the content is a ``str``."""
    with tarfile.open(place, "w:gz") as made:
        for name, content, mode in members:
            info = tarfile.TarInfo(name)
            info.mode = mode
            if isinstance(content, str):
                info.type, info.linkname = tarfile.SYMTYPE, content
                made.addfile(info)
            else:
                info.size = len(content)
                made.addfile(info, io.BytesIO(content))
    return place


def test_regular_files_are_unpacked_and_nothing_else(tmp_path: Path) -> None:
    archive = tar(
        tmp_path / "a.tar.gz",
        ("a-1/setup.py", b"raise SystemExit('run')", 0o755),
        ("a-1/a/__init__.py", b"", 0o644),
        ("a-1/link", "/etc/passwd", 0o777),
    )
    assert unpack(archive, tmp_path / "out", strip=True) == 2
    assert sorted(p.name for p in (tmp_path / "out").rglob("*") if p.is_file()) == ["__init__.py", "setup.py"]
    assert (tmp_path / "out" / "setup.py").stat().st_mode & 0o777 == 0o755
    wheel = tmp_path / "a-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as made:
        made.writestr("a/__init__.py", "x = 1\n")
    assert unpack(wheel, tmp_path / "lib", strip=False) == 1
    assert (tmp_path / "lib" / "a" / "__init__.py").read_text() == "x = 1\n"


@pytest.mark.parametrize("name", ["/etc/x", "a/../../x", "../x"])
def test_a_name_that_leads_outside_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataUnavailable, match="land outside"):
        unpack(tar(tmp_path / "a.tar.gz", (name, b"x", 0o644)), tmp_path / "out", strip=False)
    wheel = tmp_path / "a.whl"
    with zipfile.ZipFile(wheel, "w") as made:
        made.writestr(name, "x")
    with pytest.raises(DataUnavailable, match="land outside"):
        unpack(wheel, tmp_path / "out", strip=False)


def test_what_is_too_large_or_damaged_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = tar(tmp_path / "a.tar.gz", *((f"f{i}", bytes(1_000), 0o644) for i in range(20)))
    monkeypatch.setattr(repair_archives, "MAX_FILES", 10)
    with pytest.raises(DataUnavailable, match="more than 10 files"):
        unpack(bomb, tmp_path / "out", strip=False)
    monkeypatch.setattr(repair_archives, "MAX_BYTES", 999)
    with pytest.raises(DataUnavailable, match="of 1000 bytes"):
        unpack(bomb, tmp_path / "out", strip=False)
    for name in ("b.tar.gz", "b.whl"):
        (tmp_path / name).write_bytes(b"no archive")
        with pytest.raises(DataUnavailable, match="cannot be unpacked"):
            unpack(tmp_path / name, tmp_path / "out", strip=False)
