"""cluster=slurm: submits a run or sweep to Slurm as one batch job, whose tasks form a Ray cluster.

kind        the keys and their checks
script      the batch script: a value that `launch plan` prints and `launch train` submits
scheduler   sbatch, squeue and scancel
submission  the files of a job on the shared file system; submits, follows, and removes it from the queue
node        what the job runs on each node: Ray, and on the first one the driver
"""
