"""Everything that runs at an institution, and the rules that it sets itself."""
