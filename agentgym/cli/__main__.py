"""``python -m agentgym.cli``: the ``agentgym`` command without its script."""

from agentgym.cli.root import main

if __name__ == "__main__":
    main()
