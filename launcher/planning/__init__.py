"""What a run would do and cost, as a value: made without side effects, printed, or carried out by somebody else.

    plan       on the machines that there are         hosts      on the hosts of cluster=ssh
    nodes      on VMs of the catalogue                tables     those, printed
    forecast   memory and time of the strategies there

Importing this package imports nothing else.
"""
