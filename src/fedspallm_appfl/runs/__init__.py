"""One experiment, from its configuration to its result files."""
