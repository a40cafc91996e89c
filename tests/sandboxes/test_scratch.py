"""Folders beside sandboxes: on record while they are there, and gone after their owner's death."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

from agentgym.sandboxes import records
from agentgym.sandboxes.scratch import KIND, Scratch


def test_a_folder_is_on_record_until_it_is_closed() -> None:
    scratch = Scratch("test", mode=0o755)
    assert scratch.path.stat().st_mode & 0o777 == 0o755
    (scratch.path / "x").write_text("x")
    mine = [record for record in records.listed() if record.parts.get("folder") == str(scratch.path)]
    assert [(record.backend, record.owner) for record in mine] == [(KIND, "test")]
    for _ in range(2):
        scratch.close()
    assert not scratch.path.exists()
    assert mine[0].id not in {record.id for record in records.listed()}


def test_a_killed_owner_leaves_no_folder() -> None:
    code = (
        "import time; from agentgym.sandboxes.scratch import Scratch; s = Scratch('test'); "
        "(s.path / 'x').write_text('x'); print(s.path, flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        path = Path(owner.stdout.readline().strip())
        assert (path / "x").exists()
        owner.send_signal(signal.SIGKILL)
    until = time.monotonic() + 60
    while path.exists() and time.monotonic() < until:
        time.sleep(0.05)
    assert not path.exists()
