"""cluster=existing: a Ray cluster that runs already, from one of its nodes or through its Ray Jobs API."""
