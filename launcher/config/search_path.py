"""The directories that configuration is read from: `conf/`, and a user's own directory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from launcher.errors import ConfigError

# By path and not as `pkg://conf`: a user's own package called `conf` may hide ours from the import system.
CONF = Path(__file__).resolve().parents[2] / "conf"


@dataclass(frozen=True)
class Sources:
    """The directories that groups are read from, first match first."""

    directories: tuple[Path, ...]

    def groups(self) -> dict[str, list[str]]:
        """Return every configuration group with its options."""
        found: dict[str, set[str]] = {}
        for directory in self.directories:
            for file in directory.rglob("*.yaml"):
                *parents, name = file.relative_to(directory).with_suffix("").parts
                if parents and not any(part.startswith((".", "__")) for part in parents):
                    found.setdefault("/".join(parents), set()).add(name)
        return {group: sorted(options) for group, options in sorted(found.items())}


def sources(config_dir: Path | None = None) -> Sources:
    """Return where configuration is read from. Raises ConfigError for a directory that does not exist."""
    if config_dir is None:
        return Sources((CONF,))
    own = Path(config_dir).expanduser().resolve()
    if not own.is_dir():
        raise ConfigError(f"The configuration directory {config_dir} does not exist or is not a directory.")
    return Sources((own, CONF) if own != CONF else (CONF,))
