"""Tools that a policy may call."""

# A bare `import tools` from the repository's root would load a second copy of every class.
if __name__ != "agentgym.tools":
    raise ImportError("import agentgym.tools, not tools: its folder is mapped")
