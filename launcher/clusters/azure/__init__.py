"""Clusters of Azure VMs: Ray's own cluster launcher and Azure provider, with what they leave to their user.

wanted.py      configuration -> what is wanted: sizes, names, zone (a value)
network.py     the base of a cluster: network, identities (an ARM template, as a value)
ray_yaml.py    the file for `ray up` (as a value, and as text)
checks.py      credentials, quotas and sizes, asked before anything is created
provider.py    Ray's Azure provider: workers get an identity of their own, failures are counted and kept
on_head.py     what runs on the head: idle watchdog, and a report for `launch status`
lifecycle.py   up, status and down
making.py      `ray up` makes the head
node_join.py     the nodes that are waited for, and what they cost
"""
