"""Clusters of Azure VMs, created with Ray's cluster launcher and Ray's Azure node provider.

spec.py            configuration -> specification of a cluster: sizes, names, zone (a value)
network.py         the network and identities of a cluster (an ARM template, as a value)
ray_yaml.py        the file for `ray up` (as a value, and as text)
checks.py          credentials, quotas and sizes, checked before anything is created
local_files.py     SSH key, address and files of this machine that a cluster needs
lifecycle.py       up, status and down
head_creation.py   run `ray up`, which creates the head
node_join.py       wait for the nodes to join, and compute their cost
provider.py        Ray's Azure provider: separate identities for nodes, failed launches are counted and recorded
failures.py        the record of failed launches
on_head.py         programs on the head: the idle watchdog, and a report for `launch status`
"""
