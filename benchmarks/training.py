"""The figures of training beside their targets: what ``agentgym bench training`` runs."""

from __future__ import annotations

import sys
from pathlib import Path

# Last on the path: the benchmarks are called like the packages that they measure.
sys.path.append(str(Path(__file__).parent))
from figures import Target, main

TARGETS = (
    Target("update over TRL's, independent prompts", "update.independent.ratio", "×", "at least", 0.95),
    Target("  in CPU time", "update.independent.cpu_ratio", "×", "at least", 0.95),
    Target("  8 members share 768 of 1,024 tokens", "update.agentic.ratio", "×", "at least", 2),
    Target("  in CPU time", "update.agentic.cpu_ratio", "×", "at least", 2),
    Target("peak memory over TRL's, 8 × 1,024 tokens", "update.memory.ratio", "×", "at most", 0.7),
    Target("  8 members share 768", "update.agentic.memory.ratio", "×", "at most", 0.7),
    Target("exact entropies: share of a step", "update.entropy.cost", "", "at most", 0.1),
    Target("  in CPU time", "update.entropy.cpu_cost", "", "at most", 0.1),
    Target("IGPO: masked over sequential scoring, 8 turns", "igpo_scoring.ratio", "×", "at least", 3),
    Target("  in CPU time", "igpo_scoring.cpu_ratio", "×", "at least", 3),
)

if __name__ == "__main__":
    main(TARGETS)
