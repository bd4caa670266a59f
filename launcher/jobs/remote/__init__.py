"""Runs elsewhere: the command is given here, its driver works on the head of a cluster.

    submit.py     sends a run or a sweep off, and follows it
    control.py    `launch logs` and `stop` of one that was sent
    active_jobs.py the jobs that `launch down` would end
    connection.py the way to its cluster's Ray Jobs
    copies.py     its files, copied to here while it goes on
    location.py   remote.json in the run's directory: which job on which cluster
    wire.py       events of a run as lines of the job's log
    follow.py     reads those lines, over networks that drop
    packaging.py  what the cluster does not have yet: the project, values of the environment

`launcher.driver` is the other end.
"""
