"""Where the numbers of a run go: one file a destination. See `base`."""
