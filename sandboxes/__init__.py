"""Where untrusted code runs."""

# A bare `import sandboxes` from the repository's root would load a second copy of every class.
if __name__ != "agentgym.sandboxes":
    raise ImportError("import agentgym.sandboxes, not sandboxes: its folder is mapped")
