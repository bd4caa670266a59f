"""cluster=none: the job runs in the process of the command, or in the processes that torchrun or srun started."""
