"""How the workers' gradients become one update: one file a strategy."""
