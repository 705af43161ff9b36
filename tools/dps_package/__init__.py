"""Builds the product's packages and tries them; `tools/package` starts it in an environment that has what it needs."""
