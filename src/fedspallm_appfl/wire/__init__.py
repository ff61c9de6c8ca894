"""What travels between clients and server, and what rests on disk in the same form (docs/wire.md)."""
