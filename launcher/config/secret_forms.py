"""The forms of tokens and keys: those that `detect-secrets` knows, and some that it does not know yet.

Entropy is not used: it would match hashes and paths, which a run needs when it is resumed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

HINT = re.compile(r"key|pass|pwd|secret|token|credential|sas|bearer|connection|contrase", re.IGNORECASE)
# Formats that detect-secrets does not know, or knows in an older form.
_FORMS = re.compile(
    r"""(?x)
      [?&;]sig=(?!\0)[^\s&;"']+ | Account(?:Key)=(?!\0)[^\s;"']+ | SharedAccess(?:Key|Signature)=(?!\0)[^\s;"']+
    | ://(?:[^/@\s:'"]*):(?!\0@|\*)[^/@\s'"]+@
    | -----BEGIN\ [A-Z0-9 ]*PRIVATE\ KEY
    | \b(?:hf|api_org|gh[pousr]|npm|gsk|r8|lin_api|dop_v1|doo_v1|shpat|wandb_v1|tskey)_[A-Za-z0-9]{16,}
    | \b(?:github_pat|dckr_pat|ATATT3|glpat|nvapi|pul)[-_][A-Za-z0-9_-]{16,}
    | \bsk-(?=[A-Za-z_-]*[0-9])[A-Za-z0-9_-]{20,} | \b[spr]k_(?:live|test)_[A-Za-z0-9]{10,}
    | \bxox[a-z]-[A-Za-z0-9-]{10,} | \bxapp-[A-Za-z0-9-]{10,} | \bAIza[A-Za-z0-9_-]{30,} | \bya29\.[A-Za-z0-9_-]{20,}
    | \bpypi-A[A-Za-z0-9_-]{20,} | \b(?:AKIA|ASIA)[A-Z0-9]{12,} | \bSG\.[A-Za-z0-9_-]{16,}\.[A-Za-z0-9_-]{16,}
    | (?i:\bbearer)\s+(?=[A-Za-z._~+/-]*[0-9])[A-Za-z0-9._~+/=-]{16,}
    """
)
# Only texts with such a run, an upper case letter and a digit in it, are given to detect-secrets.
_RUN = re.compile(r"[A-Za-z0-9_+/=-]{20,}")
# Plugins that find other things than secrets, or whose patterns match ordinary words.
_NOT_USED = frozenset(("IPPublicDetector", "ArtifactoryDetector", "Base64HighEntropyString", "HexHighEntropyString"))


@lru_cache(maxsize=1)
def token_patterns() -> tuple[re.Pattern[str], ...] | None:
    """Return the formats of tokens that detect-secrets knows; None where it is not installed."""
    try:
        from detect_secrets.core.plugins.util import get_mapping_from_secret_type_to_class
    except ModuleNotFoundError:
        return None
    kinds: Any = get_mapping_from_secret_type_to_class().values()
    found = [kind().denylist for kind in kinds if kind.__name__ not in _NOT_USED and hasattr(kind, "denylist")]
    return tuple(pattern for patterns in found for pattern in patterns)


def may_hold_token(text: str) -> bool:
    runs = (run[0] for run in _RUN.finditer(text))
    return HINT.search(text) is not None or any(run != run.lower() and any(map(str.isdigit, run)) for run in runs)


def tokens(text: str) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of each token in a text."""
    for found in _FORMS.finditer(text):
        yield found.span()
    if may_hold_token(text):
        for pattern in token_patterns() or ():
            for found in pattern.finditer(text):
                group = next((index for index in range(1, pattern.groups + 1) if len(found[index] or "") >= 8), 0)
                yield found.span(group)
