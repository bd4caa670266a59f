"""Detects keys and texts that contain secrets, and masks them.

    mask({"db": {"password": "x"}})     # {"db": {"password": "***"}}: configuration, by name and by form
    hide("cannot open postgres://…")    # values that are known to be secret, in any text

Plain Python: no Hydra, no torch.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any

from launcher.config.secret_forms import tokens

MASK = "***"

# ---- names ----------------------------------------------------------------------------------------------------------

_SECRET_WORDS = frozenset(("pwd", "sas", "apikey", "accesskey", "bearer", "secrets"))
_SECRET_PARTS = (
    *("password", "passwd", "passphrase", "secret", "credential", "contraseña"),
    *("apikey", "privatekey", "accesskey", "accountkey", "authkey", "signingkey", "encryptionkey"),
)
# `eos_token`, `label_key`, `forward_pass` and similar names are about data, and contain no secrets.
_HARMLESS_BEFORE_TOKEN = frozenset(
    ["bos", "eos", "pad", "unk", "mask", "sep", "cls", "start", "stop", "end", "special", "blank"]
)
_HARMLESS_BEFORE_KEY = frozenset(
    [
        *("label", "text", "image", "picture", "audio", "target", "input", "output", "feature", "caption"),
        *("sort", "group", "index", "column", "id", "x", "y"),
    ]
)
_BEFORE_PASS = frozenset(
    [
        "db",
        "database",
        "user",
        "admin",
        "root",
        "key",
        "smtp",
        "mail",
        "redis",
        "mysql",
        "pg",
        "postgres",
        "ftp",
        "http",
    ]
)
# A variable of this kind names a file or an address, whose content may be secret.
_PLACE = re.compile(r"_(?:file|path|dir|home|sock|socket|cache|timeout|enabled|name|user|id)$", re.IGNORECASE)
_NO_SECRETS = frozenset(("ssh_key",))  # the path of a file


def _words(name: str) -> list[str]:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower().replace("-", "_").split("_")


@lru_cache(maxsize=4096)
def is_secret_name(name: str) -> bool:
    """Return whether a key's last part looks as if it held a secret."""
    if name in _NO_SECRETS:
        return False
    words = _words(name)
    before = words[-2] if len(words) > 1 else ""
    if words[-1] == "key" and before and before not in _HARMLESS_BEFORE_KEY:
        return True
    return _is_strong(name)


@lru_cache(maxsize=4096)
def _is_strong(name: str) -> bool:
    """Return whether a name is certainly that of a secret; `sort_order_key` may be an ordinary key."""
    words = _words(name)
    if _SECRET_WORDS.intersection(words) or "connection_string" in "_".join(words):
        return True
    if any(part in "".join(words) for part in _SECRET_PARTS):
        return True
    before = words[-2] if len(words) > 1 else ""
    if words[-1] == "token":
        return before not in _HARMLESS_BEFORE_TOKEN
    return words[-1] == "pass" and (not before or before in _BEFORE_PASS)


# ---- values that are known to be secret -----------------------------------------------------------------------------

_SHORTEST = 6  # shorter values occur in other texts as well
_known: set[str] = set()


def remember(values: Iterable[str]) -> None:
    """Register values that `hide` replaces in this process from now on."""
    _known.update(value for value in values if _is_distinctive(value))


def secrets_in(value: Any, name: str = "", inherited: bool = False) -> Iterator[str]:
    """Yield the texts of plain data that `mask` hides, except those whose key is ambiguous."""
    secret = inherited or _is_strong(name)
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from secrets_in(item, str(key), secret)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from secrets_in(item, "", secret)
    elif isinstance(value, str) and value and (secret or _holds_secret(value)):
        yield value


def hide(text: str) -> str:
    """Return a text with the values that are known to be secret as ***."""
    return hider()(text)


def hider() -> Callable[[str], str]:
    """Return `hide` for the values that are known now, which is faster for many texts."""
    pattern = _pattern(frozenset(_known).union(_of_environment()))
    return (lambda text: text) if pattern is None else lambda text: pattern.sub(MASK, text)


def _of_environment() -> Iterator[str]:
    for name, value in os.environ.items():
        if _is_strong(name) and not _PLACE.search(name) and _is_distinctive(value):
            yield value


def _is_distinctive(value: str) -> bool:
    return len(value) >= _SHORTEST and MASK not in value and not value.isdigit() and value[0] not in "/~."


@lru_cache(maxsize=8)
def _pattern(values: frozenset[str]) -> re.Pattern[str] | None:
    # As it is, and as JSON and as Python's repr write it.
    forms = {form for value in values for form in (value, json.dumps(value)[1:-1], repr(value)[1:-1])}
    return re.compile("|".join(map(re.escape, sorted(forms, key=len, reverse=True)))) if forms else None


# ---- configuration --------------------------------------------------------------------------------------------------


def mask(value: Any, name: str = "", inherited: bool = False) -> Any:
    """Return plain data with every literal secret replaced by MASK; interpolations (`${oc.env:X}`) stay."""
    secret = inherited or is_secret_name(name)
    if isinstance(value, Mapping):
        return {key: mask(item, str(key), secret) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [mask(item, "", secret) for item in value]
    if value is None or isinstance(value, bool) or value == "":
        return value
    if not isinstance(value, str):
        return MASK if secret else value
    return _mask_text(value, secret)


def find_masked(value: Any, written: Any = None, at: str = "", secret: bool = False) -> list[str]:
    """Return the dotted keys whose value is MASK, or was made from one.

    written: the same data with interpolations as they were written.
    """
    if isinstance(value, Mapping):
        found = []
        for name, item in value.items():
            below = written.get(name) if isinstance(written, Mapping) else None
            inner = secret or is_secret_name(str(name))
            found += find_masked(item, below, f"{at}.{name}" if at else str(name), inner)
        return found
    if isinstance(value, (list, tuple)):
        lists = isinstance(written, (list, tuple)) and len(written) == len(value)
        items = zip(value, written if lists else [None] * len(value), strict=True)
        found_in = (find_masked(item, below, f"{at}.{index}", secret) for index, (item, below) in enumerate(items))
        return [key for keys in found_in for key in keys]
    if not isinstance(value, str) or MASK not in value:
        return []
    return [at] if value == MASK or secret or (isinstance(written, str) and "${" in written) else []


def mask_word(word: str) -> str:
    """Return a word of the command line, `key=value`, with a literal secret in it as ***."""
    key, equals, value = word.partition("=")
    masked = mask_at(key, value)
    literal = "".join("\0" if refers else part for part, refers in _parts(value))
    # A mapping, {db: {password: x}}: a reference is no secret.
    named = re.finditer(r"""([\w.-]+)["']?\s*:(?!\s*(?:["']?\0|null\b))""", literal)
    if masked == value and any(is_secret_name(found[1]) for found in named):
        masked = MASK
    return f"{key}{equals}{masked}"


def mask_at(key: str, value: Any) -> Any:
    """Return the value of a dotted key, masked as by `mask` for that key of a configuration."""
    return mask(value, inherited=any(is_secret_name(part) for part in re.split(r"[.@/]", key.lstrip("+~"))))


def _mask_text(text: str, secret: bool) -> str:
    parts = list(_parts(text))
    literal = "".join(part for part, refers in parts if not refers).strip()
    if not secret:
        if _holds_secret("".join("\0" if refers else part for part, refers in parts)):
            return MASK
        return "".join(_mask_reference(part, False) if refers else part for part, refers in parts)
    if len(parts) == 1 and literal:
        return MASK
    kept = (_mask_reference(part, True) if refers else MASK if part.strip() else part for part, refers in parts)
    return "".join(kept)


def _parts(text: str) -> Iterator[tuple[str, bool]]:
    """Yield the parts of a text, and whether each is an interpolation, braces balanced."""
    at = 0
    while (begin := text.find("${", at)) >= 0:
        depth, end = 0, begin
        while end < len(text):
            depth += (text[end] == "{") - (text[end] == "}")
            end += 1
            if depth == 0 and end > begin + 1:
                break
        if begin > at:
            yield text[at:begin], False
        yield text[begin:end], True
        at = end
    if at < len(text):
        yield text[at:], False


def _mask_reference(reference: str, secret: bool) -> str:
    """Return `${oc.env:NAME,default}` without a default that is a secret."""
    found = re.fullmatch(r"\$\{\s*([\w.]+)\s*:\s*([^,]*?)\s*(?:,(.*))?\}", reference, re.DOTALL)
    if found is None:
        return reference
    resolver, first, rest = found[1], found[2], found[3]
    if resolver in ("oc.env", "oc.select"):
        secret = secret or is_secret_name(first.rpartition(".")[2])
    elif secret and first:  # another argument of a resolver under such a key may be the secret itself
        first = _mask_text(first, True)
    if rest is not None and rest.strip() not in ("", "null", "''", '""'):
        rest = _mask_text(rest, secret)
    return f"${{{resolver}:{first}}}" if rest is None else f"${{{resolver}:{first},{rest}}}"


# PASSWORD=x, password: x, --api-key x, as shells and .ini files have it; not a reference such as $X.
FLAG = re.compile(r"""--?([A-Za-z][\w-]*)\s+(?![-$\0<{*])([^\s"',;&|]+)""")
PAIR = re.compile(r"""([A-Za-z_][\w.-]*)["']?\s?[=:]\s?["']?(?![$\0<{*\s"'])([^\s"',;&|]+)""")


def _holds_secret(text: str) -> bool:
    """Return whether a text of a configuration holds a secret under an innocent key: a token, a password in a line."""
    if hide(text) != text or any(True for _ in tokens(text)):
        return True
    pairs = (*PAIR.finditer(text), *FLAG.finditer(text))
    return any(is_secret_name(pair[1]) and pair[1].lower() not in ("token", "key") for pair in pairs)
