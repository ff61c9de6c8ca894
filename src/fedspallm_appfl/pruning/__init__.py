"""One matrix, pruned from what is known of its inputs (docs/method.md section 1)."""
