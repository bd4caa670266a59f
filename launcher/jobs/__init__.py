"""From the words of a command to a finished run, and what is done with it afterwards.

    prepare    which run the words mean, and with which configuration
    training   from there to its end: here, as one of the ranks of torchrun, or elsewhere
    record     its directory, from the driver's side
    ranks      being one of the ranks that torchrun or srun started
    remote/    runs that the head of a cluster drives
    trained    evaluate, predict, export
    weights    which weights of other runs are meant

Importing this package imports nothing else.
"""
