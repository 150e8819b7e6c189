"""What only reproduces the readings of Huang (2024): data as the target, Eq. 14, and L_diff.

The optimum of these objectives is a sampler that returns the mean of the data (MATH.md 3.6). Each
part stands for one of the main path, which knows nothing of it.
"""
