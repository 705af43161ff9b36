"""TPMs for tests: the software TPM, what listens on its bus, and the claims over every way to one."""
