"""One experiment, from its configuration to the files of its results."""
