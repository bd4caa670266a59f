"""Sinks write the metrics of a run to their destinations. Each sink has its own file. See `base`."""
