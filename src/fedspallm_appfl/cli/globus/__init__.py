"""The verbs that Globus Compute needs."""
