"""cluster=kuberay: each run is submitted to Kubernetes as a RayJob."""
