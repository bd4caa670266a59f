"""The kinds of strategies: options, checks and costs, which are known before training. See `base`. No torch."""
