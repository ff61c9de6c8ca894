"""Speed and memory of the package, as ratios to plain writings of the published algorithms (see README.md)."""

import fedspallm_appfl  # noqa: F401 - before torch, which reads what it sets
