"""Clients at other institutions over Globus Compute (docs/globus.md)."""
