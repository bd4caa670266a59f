"""cluster=kuberay: a run becomes a RayJob of Kubernetes."""
