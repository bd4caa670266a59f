"""The plan of a run and its cost, as a value: created without side effects, then printed or executed by other packages.

    plan       on the machines that there are         hosts      on the hosts of cluster=ssh
    nodes      on VMs of the catalogue                tables     those, printed
    forecast   memory and time of the strategies there

Importing this package imports nothing else.
"""
