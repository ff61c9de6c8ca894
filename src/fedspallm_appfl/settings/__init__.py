"""One YAML, its keys, and how it is read. Imports nothing heavy: a wrong key is refused before torch is there."""
