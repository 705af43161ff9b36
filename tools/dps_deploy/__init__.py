"""Puts the agent on a board: its modules compiled, its settings and root certificates checked; see `tools/deploy`."""
