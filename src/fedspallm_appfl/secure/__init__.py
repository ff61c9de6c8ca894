"""Secure sums: the server learns the sum of many clients' integers and nothing else of them (docs/secure_sums.md)."""
