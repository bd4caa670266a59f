#!/bin/bash
#SBATCH --job-name=a1
#SBATCH --chdir=/home/ada/p
#SBATCH --output=/home/ada/s/output.txt
#SBATCH --open-mode=append
#SBATCH --nodes=2-8
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=32
#SBATCH --partition=gpu
#SBATCH --account=vision
#SBATCH --qos=high
#SBATCH --gres=gpu:a100:4
#SBATCH --constraint=a100&ib
#SBATCH --time=1-12:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --mem=64G
#SBATCH --exclude=n7
# Written by launch for sbatch.
srun --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=1 --wait=0 bash -c 'set -e
trap '"'"''"'"' USR1 USR2
module load cuda
export NAME='"'"'two words'"'"'
exec "$@"' setup python -P -m launcher.clusters.slurm.node /home/ada/s /shared/runs/a1 --requeue -- train experiment=gpt2 'optimizer.groups=[{match: '"'"'fc.*'"'"', lr: 1e-3}]' 'run.name="a1"' 'run.root="/shared/runs"' cluster.node_usd_per_hour=3.5 cluster.head_usd_per_hour=0 cluster.budget_usd=50 'cluster.env=[HF_TOKEN]' || exit
status=$(cat /home/ada/s/exit)
if [ "$status" = requeue ]; then exec scontrol requeue "$SLURM_JOB_ID"; fi
exit "$status"
