"""Files that hold keys, passwords or tokens: they leave this machine neither with a project nor in a patch.

    rules = SecretFiles(directory)
    rules.withholds("config/.env")     # True

A file `.launchignore` in the directory, in the syntax of .gitignore, adds to the rules (`data/raw/`) or takes from them
(`!certificates/ca.pem`).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathspec import GitIgnoreSpec

IGNORE_FILE = ".launchignore"
# Names of files and folders, at any depth, in any case. .gitignore and rsync interpret them in the same way.
PATTERNS = (
    # variables of an environment
    *(".env", ".env.*", "*.env", ".envrc", ".flaskenv"),
    # private keys, and stores of keys
    *(".ssh", "id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*", "*.pem", "*.key", "*.ppk", "*.p12", "*.pfx", "*.p8"),
    *("*.jks", "*.keystore", "*.kdbx", ".gnupg", "*.gpg", "*.pgp", "*.ovpn"),
    # clouds and clusters
    *(".aws", ".azure", ".oci", ".boto", ".s3cfg", "rclone.conf", ".config/gcloud", ".kube", "kubeconfig*"),
    *("*.kubeconfig", "application_default_credentials.json", "client_secret*.json", "*service[-_]account*.json"),
    *(".terraform.d", "*.tfstate", "*.tfstate.*", "*.tfvars", "*.publishsettings", "msal_token_cache*"),
    *(".databrickscfg", ".modal.toml", ".vault-token", "accesstokens.json"),
    # package registries, code hosts, services
    *(".netrc", "_netrc", ".pypirc", ".npmrc", ".yarnrc.yml", ".docker/config.json", ".dockercfg", ".dockerconfigjson"),
    *(".git-credentials", ".config/gh", ".condarc", "kaggle.json", ".kaggle", ".huggingface", "huggingface/token"),
    *(".cargo/credentials*", ".gem/credentials", ".m2/settings.xml"),
    # databases
    *(".pgpass", "pgpass.conf", ".my.cnf", ".mylogin.cnf", ".htpasswd"),
    # usual names of secrets
    *("credentials", "credentials.*", ".credentials*", "secrets", "secret.*", "secrets.*", ".secret*", "password.*"),
    *("passwords.*", "hf_token*", ".token", "api[-_]key*", "apikey*", ".streamlit/secrets.toml"),
    *(".bash_history", ".zsh_history", ".python_history", ".psql_history", ".mysql_history"),
)
# Files that the patterns match by accident: templates, and public keys.
_HARMLESS = re.compile(r"\.(example|sample|template|dist|pub)$")
# Code is not withheld because of its content: without a module a run does not start.
_CODE = frozenset((".py", ".pyi", ".ipynb", ".sh", ".md", ".rst", ".c", ".cc", ".cpp", ".cu", ".h", ".rs", ".js"))
_SOURCES = frozenset((".py", ".pyi", ".pyx"))
_LARGEST_KEY = 64 * 1024
_KEY = re.compile(rb"-----BEGIN [A-Z0-9 ]*PRIVATE KEY( BLOCK)?-----|\"private_key\"\s*:|^\s*client-key-data\s*:", re.M)


def _compiled() -> re.Pattern[str]:
    globs = (re.escape(glob).replace(r"\*", "[^/]*").replace(r"\[\-_\]", "[-_]") for glob in PATTERNS)
    return re.compile(rf"(?:^|/)(?:{'|'.join(globs)})(?:/|$)")


_NAMES = _compiled()


class SecretFiles:
    """The rules for the files of one directory.

    Args:
        directory: `.launchignore` is read from there; None: the rules of launch alone.
    """

    def __init__(self, directory: Path | None = None) -> None:
        self._directory = directory
        self._own = _own_rules(directory) if directory is not None else None

    def withholds(self, name: str) -> bool:
        """Return whether a file, given by its path relative to the directory, stays on this machine."""
        own = self._own.check_file(name).include if self._own is not None else None
        if own is not None:
            return own
        if is_secret_path(name):
            return True
        if self._directory is None:
            return False
        path = self._directory / name
        if path.is_symlink():  # under another name it is the same file
            real = path.resolve()
            if real.is_relative_to(self._directory.resolve()):
                return self.withholds(str(real.relative_to(self._directory.resolve())))
        return _holds_key(path)

    def ignores(self, name: str) -> bool:
        """Return whether `.launchignore` is the reason why a file stays."""
        return self._own is not None and self._own.check_file(name).include is True


def is_secret_path(name: str) -> bool:
    """Return whether a path looks as if it held a secret, by its name alone."""
    lowered = name.lower()
    if Path(lowered).suffix in _SOURCES and not _NAMES.search(f"{Path(lowered).parent.as_posix()}/"):
        return False  # secrets.py is a module
    return _NAMES.search(lowered) is not None and _HARMLESS.search(lowered) is None


def _own_rules(directory: Path) -> GitIgnoreSpec | None:
    from pathspec import GitIgnoreSpec

    try:
        return GitIgnoreSpec.from_lines((directory / IGNORE_FILE).read_text(errors="replace").splitlines())
    except OSError:
        return None


def _holds_key(path: Path) -> bool:
    try:
        if path.suffix.lower() in _CODE or path.stat().st_size > _LARGEST_KEY:
            return False
        return _KEY.search(path.read_bytes()) is not None
    except OSError:
        return False
