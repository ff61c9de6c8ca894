"""The format of messages between clients and server, and of data stored in the same form (docs/wire.md)."""
