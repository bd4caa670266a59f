"""Runs a job from the command line's overrides to its result, and uses trained runs.

    prepare    composes the configuration, and finds the run to start, resume or imitate
    training   trains: in this process, as a rank of torchrun or srun, on Ray, or on a remote cluster
    record     writes the run's directory on the driver's side
    ranks      joins the ranks that torchrun or srun started
    remote/    runs that the head of a cluster drives
    trained    evaluate, predict and export
    weights    finds the weights of another run

Importing this package imports nothing else.
"""
