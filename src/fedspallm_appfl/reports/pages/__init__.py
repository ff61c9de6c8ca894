"""Pages of HTML: of a run, and of several side by side; each is one file with its pictures in it."""
