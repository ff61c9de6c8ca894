"""What keeps a configuration from being run, and what it will do, said before anything runs."""
