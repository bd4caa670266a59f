"""cluster=local: a Ray on this machine that serves one command, or is kept for the next commands."""
