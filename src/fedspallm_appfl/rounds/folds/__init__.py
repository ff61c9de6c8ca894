"""What the server makes of each kind of upload: it checks a unit, folds it into sums, and closes the sums."""
