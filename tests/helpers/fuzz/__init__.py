"""What comes from outside, changed at random: only errors of this package may come of it, soon and in little memory."""
