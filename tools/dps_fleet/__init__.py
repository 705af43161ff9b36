"""A fleet of real agent cores in virtual time, the sums behind its settings, and the same fleet on real sockets."""
