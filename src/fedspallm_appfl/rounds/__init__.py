"""The two sides of a round, without a framework: a client's and the server's."""
