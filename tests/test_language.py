"""The language of the project: words that its readers do not search for are not used, with the words to use instead.

Quotations, code and data are exempt: text between double quotes or backticks, and blocks of code in a page. The check
reads comments and strings of Python files, and comments of other files.
"""

from __future__ import annotations

import io
import re
import tokenize
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Folders and files whose language is checked.
CHECKED = ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "docs", "conf", "models", "tools"]
CHECKED += ["benchmarks", "launcher", "tests"]
# Pattern of the words to avoid -> what to write.
BANNED = {
    r"told|tells?(?! \w+ apart)|telling": "print, report, log, notify, specify",
    r"anew": "again, from the start, restart",
    r"nobody|somebody|whoever": "the noun: no rank, another user, the process that",
    r"hears?|heard": "receive, listen, detect",
    r"lies|lying": "is, is stored, is located",
    r"(?:give|gives|giving|gave|given) up": "declare lost, stop retrying, abandon",
    r"(?:take|takes|took|taken) (?:\w+ )?for(?! granted)": "treat as, interpret as",
    r"stands? (?:for|in|there|above|beside|between)": "means, is, precedes, is stored in",
    r"(?:go|goes|going|gone|went) on": "continue",
    r"says?(?: so)?|said": "print, state, report, specify",
    r"what is there|that which": "the noun",
    r"mishaps?|unawares|likewise": "failure, accidentally, also",
    r"mend(?:s|ed|ing)?": "fix, repair",
}
PATTERN = re.compile("|".join(rf"(?P<g{i}>\b(?:{words})\b)" for i, words in enumerate(BANNED)), re.IGNORECASE)
QUOTED = re.compile(r"``.*?``|`[^`]*`|\"[^\"\n]*\"|“[^”]*”")


def files() -> list[Path]:
    found = []
    for name in CHECKED:
        path = ROOT / name
        found += [path] if path.is_file() else [*path.rglob("*.py"), *path.rglob("*.md"), *path.rglob("*.yaml")]
    return [file for file in found if "__pycache__" not in file.parts and file != Path(__file__)]


def prose(file: Path) -> list[tuple[int, str]]:
    """Return (line number, text) of what a reader reads in a file."""
    text = file.read_text()
    if file.suffix == ".md":
        kept = re.sub(r"^```.*?^```$", lambda block: "\n" * block[0].count("\n"), text, flags=re.DOTALL | re.MULTILINE)
        kept = re.sub(r"\]\([^)]*\)|^ {4}.*", "", kept, flags=re.MULTILINE)
        return list(enumerate(QUOTED.sub(lambda quote: "\n" * quote[0].count("\n"), kept).splitlines(), start=1))
    if file.suffix == ".py":
        kinds = {tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}
        tokens = [token for token in tokenize.generate_tokens(io.StringIO(text).readline) if token.type in kinds]
        return [(token.start[0], QUOTED.sub("", _unquoted(token.string))) for token in tokens]
    comments = [(number, line.partition("#")) for number, line in enumerate(text.splitlines(), start=1)]
    return [(number, QUOTED.sub("", comment)) for number, (_, mark, comment) in comments if mark]


def _unquoted(text: str) -> str:
    """Return what is between the quotation marks of a string literal; a comment stays as it is."""
    return re.sub(r"\A[a-zA-Z]*(\"\"\"|'''|\"|')(.*)\1\Z", r"\2", text, flags=re.DOTALL)


def findings(file: Path) -> list[str]:
    found = []
    for number, text in prose(file):
        for match in PATTERN.finditer(text):
            line = number + text.count("\n", 0, match.start())
            instead = list(BANNED.values())[int((match.lastgroup or "g0")[1:])]
            found.append(f'{file.relative_to(ROOT)}:{line}: "{match[0]}"; write: {instead}')
    return found


def test_banned_words_are_not_used() -> None:
    found = [finding for file in files() for finding in findings(file)]
    assert found == [], "\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("name", "text", "lines"),
    [
        ("a.md", 'A run goes on.\n```\nIt lies.\n```\nIt "tells" `told`.\nNobody hears.', [1, 6, 6]),
        ("a.py", '"""Say it.\n\nIt lies."""\nname = "nobody"  # starts anew\nlies = f"{name} said"', [1, 3, 4, 4, 5]),
        ("a.yaml", "# told\ntold: said # fixed", [1]),
    ],
)
def test_the_check_finds_prose_and_nothing_else(
    name: str, text: str, lines: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / name).write_text(text)
    assert [int(finding.split(":")[1]) for finding in findings(tmp_path / name)] == lines


def test_every_file_names_the_same_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    places = {
        "Dockerfile": r'image\.version="([^"]+)"',
        "CITATION.cff": r"^version: (\S+)$",
        "CHANGELOG.md": r"^## \[(\d[^\]]*)\]",
    }
    found = {name: re.search(line, (ROOT / name).read_text(), re.MULTILINE) for name, line in places.items()}
    assert {name: match and match[1] for name, match in found.items()} == dict.fromkeys(places, version)


def test_the_changelog_has_each_heading_once_per_version() -> None:
    """A merge that keeps both sides may repeat a heading, and the entries below it."""
    for version in re.split(r"^## ", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)[1:]:
        headings = re.findall(r"^### (\w+)$", version, re.MULTILINE)
        assert len(headings) == len(set(headings)), version.splitlines()[0]
        assert set(headings) <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
