"""Hostile code against the sandboxes that are meant for it: nothing gets out, whoever started them.

The attacks and what is seen of them are in ``probes/``; ``docs/guides/sandboxes.md`` lists them.
"""

from __future__ import annotations

import importlib.util
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

HERE = Path(__file__).parent / "probes"
USER = 64_950
"""Somebody that nobody is."""

DECLARED = {("bubblewrap", "user", "processor_time")}
"""What a backend says itself that it does not hold there."""


def _battery() -> ModuleType:
    spec = importlib.util.spec_from_file_location("battery", HERE / "battery.py")
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules["battery"] = made
    spec.loader.exec_module(made)
    return made


PROBES = sorted(_battery().PROBES)


class Battery:
    """A process of its own that attacks a backend's sandboxes as one user."""

    def __init__(self, kind: str, user: int, folder: Path) -> None:
        cache = folder / "cache"
        cache.mkdir()
        folder.chmod(0o755)
        if user:
            for place in (folder, cache):
                os.chown(place, user, user)
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "battery.py"), kind, str(user), str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "AGENTGYM_CACHE": str(cache), "TMPDIR": str(folder)},
        )
        self._answers: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line)

    def verdict(self, name: str) -> list[str]:
        assert self._process.stdin is not None
        self._process.stdin.write(name + "\n")
        self._process.stdin.flush()
        while True:  # the answer before it may have come too late
            found: list[str] = json.loads(self._answers.get(timeout=150))
            if found[2] == name:
                return found

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        try:
            assert self._process.wait(60) == 0
        finally:
            self._process.kill()
            self._process.wait()
            self._thread.join()
            self._process.stdout.close()


TARGETS = [
    pytest.param(("bubblewrap", "root"), marks=pytest.mark.bubblewrap, id="bubblewrap-root"),
    pytest.param(("bubblewrap", "user"), marks=pytest.mark.bubblewrap, id="bubblewrap-user"),
    pytest.param(("docker", "root"), marks=[pytest.mark.docker, pytest.mark.slow], id="docker"),
]


@pytest.fixture(scope="module", params=TARGETS)
def target(request: pytest.FixtureRequest) -> Iterator[tuple[str, str, Battery]]:
    kind, who = request.param
    root = os.geteuid() == 0
    if who == "root" and not root:
        pytest.skip("root's sandboxes are attacked where the tests are root")
    if who == "user" and root and not _readable(HERE):
        pytest.skip("an ordinary user cannot read the repository here")
    # Not pytest's own folder: nobody else gets there.
    with tempfile.TemporaryDirectory(prefix="agentgym-probes-") as folder:
        made = Battery(kind, USER if who == "user" and root else 0, Path(folder))
        yield kind, who, made
        made.close()


def _readable(place: Path) -> bool:
    return all(above.stat().st_mode & 0o005 == 0o005 for above in (place, *place.parents))


@pytest.mark.parametrize("name", PROBES)
def test_the_sandbox_holds(target: tuple[str, str, Battery], name: str) -> None:
    kind, who, battery = target
    verdict, evidence, *_ = battery.verdict(name)
    assert verdict == ("declared" if (kind, who, name) in DECLARED else "held"), evidence


def test_there_are_enough_probes() -> None:
    assert len(PROBES) >= 80


def test_the_page_lists_every_probe() -> None:
    page = (Path(__file__).parents[2] / "docs" / "guides" / "sandboxes.md").read_text(encoding="utf-8")
    assert [name for name in PROBES if f"`{name}`" not in page] == []
