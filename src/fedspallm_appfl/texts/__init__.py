"""Text as people have it, and windows of tokens from it."""
