"""Times, weights and the network's times of a solver, learned together (MATH.md 5)."""
