"""The data store for payloads that are too large for a task: the objects of one run, in a place that all sites reach."""
