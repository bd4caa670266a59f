"""Faults of machines and processes, and the expected result of a run: see `harness.py` and `table.py`."""
