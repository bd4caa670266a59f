"""What launch knows of each strategy before it trains: one object in one file a strategy. See `base`. No torch."""
