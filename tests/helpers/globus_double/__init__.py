"""A world of Globus Compute on 127.0.0.1: a double of its web service, a real broker, real endpoint daemons.

The double was written from the source of `globus_compute_sdk` and `globus_compute_endpoint` 4.8: what it answers is what
these read. Status codes, error bodies, quotas and policies of the real service may differ.
"""
