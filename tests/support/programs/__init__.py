"""Programs on the device: the agent as one, and those that use its socket, well and badly."""
