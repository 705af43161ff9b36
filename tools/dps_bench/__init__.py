"""Measures what the agent costs, beside its floor and beside other clients; `tools/bench` starts it."""
