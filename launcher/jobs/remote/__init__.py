"""Remote runs: their driver runs on the head of a cluster, and the command on this machine submits and follows them.

    submit.py       submits a run or a sweep, and follows it
    control.py      `launch logs` and `launch stop` of a remote run
    active_jobs.py  the jobs that `launch down` would kill
    connection.py   connects to the Ray Jobs API of a run's cluster
    copies.py       copies a run's files to this machine while it runs
    location.py     remote.json in the run's directory: the job and its cluster
    states.py       the states of remote runs
    wire.py         encodes events as lines of the job's log
    follow.py       reads these lines, and reconnects after network failures
    packaging.py    packs the project and the specification of a job for the cluster

`launcher.driver` is the program on the head.
"""
