#!/bin/bash
#SBATCH --job-name=a1
#SBATCH --chdir=/home/ada/p
#SBATCH --output=/home/ada/s/output.txt
#SBATCH --open-mode=append
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --time=2
#SBATCH --signal=USR1@60
#SBATCH --no-requeue
# Written by launch for sbatch.
srun --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=1 --wait=0 python -P -m launcher.clusters.slurm.node /home/ada/s /shared/runs/a1 -- train experiment=gpt2 'optimizer.groups=[{match: '"'"'fc.*'"'"', lr: 1e-3}]' 'run.name="a1"' 'run.root="/shared/runs"' || exit
status=$(cat /home/ada/s/exit)
exit "$status"
