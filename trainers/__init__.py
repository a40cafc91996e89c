"""Advantages, losses, buffers and the algorithms, one small file each."""

# A bare `import trainers` from the repository's root would load a second copy of every class.
if __name__ != "agentgym.trainers":
    raise ImportError("import agentgym.trainers, not trainers: its folder is mapped")
