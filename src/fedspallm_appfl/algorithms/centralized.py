"""Centralized: one pruner sees the text of all clients. It breaks what the federation is for, and is there to compare with.

The pooled text is one client's, with the windows that each client would have drawn; so it needs one process that can read
all texts.
"""

from fedspallm_appfl.algorithms.exchange import Exchange

LABEL = "centralized"
EXCHANGES = (Exchange("weights", None),)
POOLED = "pooled"  # the id of the client that has all the text
