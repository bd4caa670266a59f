"""cluster=ssh: hosts with SSH access become a Ray cluster."""
