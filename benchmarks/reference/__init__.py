"""What the package is compared with: plain writings of the published algorithms, in the structure of the authors' code."""
