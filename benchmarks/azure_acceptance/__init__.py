"""The acceptance run on Azure: two GPU nodes for minutes, checked, evicted, compared with the plan, and removed.

`__main__` reads the words and asks; `session` orders the stages and always removes the cluster; `nodes`, `training` and
`cloud` hold the checks of one concern each; `report` keeps the rows and hides what must not be published.
"""
