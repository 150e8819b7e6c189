"""Parts of `RDPO`: tables drawn at random, how they act, and how what they earned moves them."""
