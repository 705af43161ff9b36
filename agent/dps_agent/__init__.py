"""Gives a device with a TPM 2.0 its hub: the logic, the same on CPython and MicroPython."""

__version__ = "0.1.0"
