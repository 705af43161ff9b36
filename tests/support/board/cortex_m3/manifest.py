# The board's own manifest: it needs none of MicroPython's libraries.
