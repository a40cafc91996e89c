"""Environment families; each is imported only when one of its ids is made."""

# A bare `import environments` from the repository's root would load a second copy of every class.
if __name__ != "agentgym.environments":
    raise ImportError("import agentgym.environments, not environments: its folder is mapped")
