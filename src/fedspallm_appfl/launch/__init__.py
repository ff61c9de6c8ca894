"""Ways to run an experiment: in one process, or under mpiexec."""
