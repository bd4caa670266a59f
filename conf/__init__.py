"""The configuration groups. A package only so that the YAML files are installed with the launcher."""
