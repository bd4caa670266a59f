"""cluster=ssh: a Ray cluster on hosts with SSH access."""
