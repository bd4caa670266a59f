"""Strategies combine the gradients of all workers into one update. Each strategy has its own file."""
