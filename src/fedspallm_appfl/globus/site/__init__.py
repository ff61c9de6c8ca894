"""All that runs at an institution, and what it decides for itself."""
