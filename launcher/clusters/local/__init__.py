"""cluster=local: a Ray on this machine, for one command or kept for the next."""
