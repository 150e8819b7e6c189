"""Agents that distil a network's fine solver into the network, which then takes few steps.

`SFD` follows the fine solver's trajectory, `ProgressiveDistillation` halves the steps again and
again, and `ConsistencyDistillation` jumps from anywhere on the trajectory to its end. `DMD` matches
the distribution of samples instead of paths. All start from the network that they are given, judge
by its fine solver on held-out noise, and need no data, but for DMD's critic.
"""
