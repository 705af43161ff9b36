"""The agent on a microcontroller under MicroPython."""
