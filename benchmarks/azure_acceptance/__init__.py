"""The acceptance run on Azure: two GPU nodes for minutes, checked, evicted, compared with the plan, and removed.

`__main__` parses the words and asks for confirmation; `session` runs the stages and always removes the cluster;
`nodes`, `training` and `cloud` contain the checks; `report` stores the rows and hides what must not be published.
"""
