"""cluster=none: the job runs in the process of the command, or in ranks that torchrun or srun started."""
