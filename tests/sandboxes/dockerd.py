"""A Docker daemon for as long as somebody holds the lock ``FOLDER/users``: ``python dockerd.py FOLDER``.

The workers of one test run share it; the kernel drops their locks however they end, and then the daemon goes,
and with it all that it made; the file ``ended`` says so. The command itself returns at once.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

LOOK_SECONDS = 0.5
STOP_SECONDS = 40


def main(folder: Path) -> None:
    with (folder / "users").open("w") as users, (folder / "log").open("w") as log:
        daemon = subprocess.Popen(
            [
                "dockerd", f"--host=unix://{folder}/docker.sock", f"--data-root={folder}/data",
                f"--exec-root={folder}/exec", f"--pidfile={folder}/pid", "--bridge=none", "--iptables=false",
                "--ip6tables=false", "--exec-opt=native.cgroupdriver=cgroupfs",
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )  # fmt: skip
        while daemon.poll() is None:
            time.sleep(LOOK_SECONDS)
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
                daemon.terminate()
                try:
                    daemon.wait(STOP_SECONDS)
                except subprocess.TimeoutExpired:
                    daemon.kill()
                    daemon.wait()
        for name in ("data", "exec", "docker.sock"):
            shutil.rmtree(folder / name, ignore_errors=True)
        (folder / "ended").touch()


if __name__ == "__main__":
    (Path(sys.argv[1]) / "ended").unlink(missing_ok=True)
    if not os.fork():
        os.setsid()
        main(Path(sys.argv[1]))
