"""The figures of sandboxes beside their targets: what ``agentgym bench sandboxes`` runs."""

from __future__ import annotations

import sys
from pathlib import Path

# Last on the path: the benchmarks are called like the packages that they measure.
sys.path.append(str(Path(__file__).parent))
from figures import Target, main

TARGETS = (
    Target("bubblewrap: start, median", "bubblewrap.start.p50_ms", "ms", "at most", 25),
    Target("  one-shot /bin/true", "bubblewrap.once.p50_ms", "ms", "at most", 20),
    Target("  /bin/true in a running sandbox", "bubblewrap.running.p50_ms", "ms", "at most", 2),
    Target("  fork of 1,000 files, 10 MB", "bubblewrap.fork.p50_ms", "ms", "at most", 50),
    Target("  sandboxes at once", "bubblewrap.at_once.alive", "", "at least", 100),
    Target("docker: exec over ours, /bin/true", "container.ratio", "×", "at least", 5),
)

if __name__ == "__main__":
    main(TARGETS)
