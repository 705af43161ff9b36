"""Every parser that reads from a network or a file, as something that any bytes can be thrown at."""
