"""Runs first at each start and must return; the agent needs nothing here."""
