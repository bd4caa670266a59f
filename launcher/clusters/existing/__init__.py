"""cluster=existing: use a running Ray cluster, from one of its nodes or through its Ray Jobs API."""
