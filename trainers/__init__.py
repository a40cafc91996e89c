"""Advantages, losses, buffers and the algorithms, one small file each.

Invariant: ``collect -> score -> advantage -> loss -> update -> publish`` are plain functions that an
algorithm's file composes; a name of :data:`ALGORITHMS` or of an installed plug-in is all a caller needs.
"""

from __future__ import annotations

# A bare `import trainers` from the repository's root would load a second copy of every class.
if __name__ != "agentgym.trainers":
    raise ImportError("import agentgym.trainers, not trainers: its folder is mapped")

ALGORITHMS = {
    "cloning": "agentgym.trainers.cloning:CLONING",
    "pocket": "agentgym.trainers.pocket:POCKET",
    "policy-gradient": "agentgym.trainers.policy_gradient:POLICY_GRADIENT",
}
