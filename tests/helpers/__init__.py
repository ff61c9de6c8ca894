"""What tests share: paths, tiny models, oracles, doubles of services."""
