"""Exchanges of which the server sees the sums of all clients alone (`server_configs.secure_sums`)."""
