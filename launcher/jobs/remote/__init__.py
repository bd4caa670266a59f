"""Runs elsewhere: the command is given here, its driver works on the head of a cluster.

    caller.py     sends a run off, follows it, asks it to stop
    place.py      remote.json in the run's directory: which job on which cluster
    wire.py       events of a run as lines of the job's log
    follow.py     reads those lines, over networks that drop
    freight.py    what the cluster does not have yet: the project, values of the environment

`launcher.driver` is the other end.
"""
