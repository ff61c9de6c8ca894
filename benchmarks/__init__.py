"""Speed and memory of the package, as ratios to plain writings of the published algorithms (see README.md)."""
