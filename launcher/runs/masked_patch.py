"""Masks secrets in uncommitted changes, by the rules of `detect-secrets` for source code and by our own."""

from __future__ import annotations

import re
from collections.abc import Iterator

from launcher.config.masking import FLAG, MASK, PAIR, hide, is_secret_name
from launcher.config.secret_forms import HINT, may_hold_token, token_patterns, tokens

# name = "value", name: str = 'value', "name": "value", f(name="value"), get("name", "value")
_QUOTED = re.compile(
    r"""([A-Za-z_][\w.-]*)(?:["'`]\]?\s*,|["'`]?\]?(?:\s*:\s*[\w\[\]., |]{1,40}?)?\s*(?::=|=>|={1,3}|!==?|:))"""
    r"""\s*[rbfuRBFU@]{0,2}(\"\"\"|\'\'\'|["'`])(.+?)(?:\2|$)"""
)
_CODE = (".py", ".pyi", ".pyx", ".ipynb", ".c", ".cc", ".cpp", ".cu", ".h", ".hpp", ".go", ".java", ".js", ".ts", ".rs")
# The lines of a key, each with the sign of a diff before it, or all in one line of JSON.
_BLOCK = re.compile(r"(-----BEGIN [A-Z0-9 ]*PRIVATE KEY(?: BLOCK)?-----)([\sA-Za-z0-9+/=:,\\-]*)")


def mask_patch(text: str) -> str:
    """Return a diff with likely secrets replaced by ***. The diff may no longer apply."""
    if may_hold_token(text) and token_patterns() is None:
        return "# Not recorded: detect-secrets is not installed, so that secrets cannot be found.\n"
    text = _BLOCK.sub(lambda found: found[1] + re.sub(r"(?m)^([+ -]?).+$", rf"\1{MASK}", found[2]), hide(text))
    lines, code = [], False
    for line in text.split("\n"):
        if line.startswith(("--- ", "+++ ")):
            code = line.rstrip().endswith(_CODE)
        lines.append(_mask_line(line, code))
    return "\n".join(lines)


def _mask_line(line: str, code: bool) -> str:
    spans = list(tokens(line))
    if HINT.search(line):
        pairs = [(found[1], found.span(3)) for found in _QUOTED.finditer(line)]
        if not code:
            plain = (*PAIR.finditer(line), *FLAG.finditer(line))
            pairs += [(found[1], found.span(2)) for found in plain]
        spans += [span for name, span in pairs if is_secret_name(name.rpartition(".")[2])]
        spans += _of_keywords(line, code)
    kept, at = [], 0
    for begin, end in sorted(spans):
        if end > at:
            kept += [line[at:begin], MASK] if begin >= at else []
            at = end
    return "".join([*kept, line[at:]])


def _of_keywords(line: str, code: bool) -> Iterator[tuple[int, int]]:
    """Yield the findings of detect-secrets' keyword rules."""
    from detect_secrets.plugins import keyword

    rules = keyword.QUOTES_REQUIRED_DENYLIST_REGEX_TO_GROUP if code else keyword.CONFIG_DENYLIST_REGEX_TO_GROUP
    for pattern, group in rules.items():
        for found in pattern.finditer(line):
            yield found.span(group)
