"""The plan of a run and its cost, as a value: created without side effects, then printed or executed by other packages.

    plan       a run on existing machines             hosts      a run on the hosts of cluster=ssh
    nodes      a run on VMs of the catalogue          tables     the text of that plan
    forecast   memory and time of each strategy on these VMs

Importing this package imports no other module.
"""
