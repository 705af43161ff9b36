"""Boards for tests: what they are made of, what runs on them, and what they are plugged into."""
