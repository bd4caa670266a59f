"""What happens to machines, and what has to come of a run: see `harness.py` and `table.py`."""
