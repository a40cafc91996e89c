"""The command line: the composition root, which may import any room and which nothing imports."""
