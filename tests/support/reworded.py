"""Other words for the messages of `launcher` and `models`: a test that passes with them does not depend on prose.

`install` makes this process, and the Python processes that it starts, import both packages with each plain word of a
message in upper case. What a message quotes stays: keys, paths, numbers, commands, names in quotes.
This module imports nothing of the project, since `reworded_site/sitecustomize.py` loads it in other processes.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.abc
import importlib.machinery
import marshal
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType

_PROJECT = Path(__file__).resolve().parents[2]
_PACKAGES = ("launcher", "models")
SITE = Path(__file__).with_name("reworded_site")

# A token of a message: something quoted, a command, or a run of characters without a space.
_VERBS = "train|plan|test|predict|export|runs|diff|logs|stop|rm|board|sizes|up|status|down|help"
_COMMANDS = "launch|pip|apt-get|ssh|git|sudo|az|kubectl|helm|python3?|ulimit|export|nvidia-smi"
_TOKEN = re.compile(
    r"""(?:(?<=\s)|(?<=\()|^)"[^"\s][^"]*"|`[^`]*`|(?:(?<=\s)|(?<=\()|^)'[^'\s][^']*'"""
    rf"""|(?<=: )(?:{_COMMANDS})\s[^.,;]*|(?:(?<=\s)|(?<=\()|^)launch(?:\s(?:{_VERBS}))?(?![^\s.,;:)])|\S+"""
)
_PLAIN = re.compile(r"(\(*)((?!launch\b)[a-z]{4,})([.,;:?!)…]*)")
_VALUE = "\0"  # a formatted value of an f-string
# Scripts, patterns and texts of other programs, which look like messages.
_NO_MESSAGE = re.compile(
    r"&&|\|\||\$\(|\$\{|\$[A-Z]|2>|; do\b|\bimport |^\s*(?:exec|sudo|cd|mkdir|test|kill|flock|echo|printf|printenv) "
    r"|(?m:^#)|\\[Sdw(|]|\w\|\w|\.\*|\(\?[:!]"
    r"|@@| eq '| -[cm] (?:\0|'|pip\b|launcher\.)|^launcher\.|ulimit|\buint8\b|^\{\w+:"
    r"|command not found|^the model$|^(?:step|epoch|loss) \0|^Ray runtime started|^\0 stop$"
)

# Functions whose arguments are compared with text, or looked up: not messages.
_LOOK_UP = {
    *("compile", "search", "match", "fullmatch", "findall", "finditer", "sub", "filterwarnings"),
    *("startswith", "endswith", "split", "partition", "rpartition", "replace", "removeprefix", "removesuffix"),
    *("find", "index", "count", "get", "getattr"),
}


def reworded(text: str) -> str:
    """Return a message with its plain words of four letters or more in upper case."""
    return _TOKEN.sub(lambda token: _PLAIN.sub(_upper, token[0]) if _PLAIN.fullmatch(token[0]) else token[0], text)


def _upper(word: re.Match[str]) -> str:
    return word[1] + word[2].upper() + word[3]


class _Messages(ast.NodeTransformer):
    """Rewords each text of at least two words that is not a docstring, a pattern, a key or a script."""

    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        return node if isinstance(node.value, ast.Constant) else self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        return node

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        node.value = self.visit(node.value)
        return node

    def visit_keyword(self, node: ast.keyword) -> ast.AST:
        return node if node.arg == "loc" else self.generic_visit(node)  # Matplotlib's "upper left"

    def visit_MatchValue(self, node: ast.MatchValue) -> ast.AST:
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        return node if name in _LOOK_UP else self.generic_visit(node)

    def visit_Tuple(self, node: ast.Tuple) -> ast.AST:
        """Leave the first item of each row of a table: a pattern, or a key."""
        for item in node.elts:
            if isinstance(item, ast.Tuple) and item.elts:
                item.elts[1:] = [self.visit(further) for further in item.elts[1:]]
        node.elts = [item if isinstance(item, ast.Tuple) else self.visit(item) for item in node.elts]
        return node

    def visit_Dict(self, node: ast.Dict) -> ast.AST:
        node.values = [self.visit(value) for value in node.values]
        return node

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        if isinstance(node.value, str) and _is_message(node.value):
            return ast.copy_location(ast.Constant(reworded(node.value)), node)
        return node

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.AST:
        for part in node.values:
            if isinstance(part, ast.FormattedValue):
                part.value = self.visit(part.value)
        whole = "".join(str(part.value) if isinstance(part, ast.Constant) else _VALUE for part in node.values)
        if _is_message(whole):
            constants = reworded(whole).split(_VALUE)
            parts = iter(constants)
            values: list[ast.expr] = [ast.Constant(next(parts))]
            for part in node.values:
                if isinstance(part, ast.FormattedValue):
                    values += [part, ast.Constant(next(parts))]
            node.values = values
        return node


def _is_message(text: str) -> bool:
    return len(text.split()) > 1 and not _NO_MESSAGE.search(text)


def transformed(source: bytes | str) -> ast.Module:
    """Return the syntax tree of a module whose messages are reworded."""
    return ast.fix_missing_locations(_Messages().visit(ast.parse(source)))


class _Loader(SourceFileLoader):
    def get_code(self, fullname: str) -> CodeType:
        source = self.get_data(self.path)
        cached = _cache() / hashlib.sha256(self.path.encode() + source).hexdigest()
        if cached.exists():
            code: CodeType = marshal.loads(cached.read_bytes())
            return code
        code = compile(transformed(source), self.path, "exec", dont_inherit=True)
        written = cached.with_suffix(f".{os.getpid()}")
        written.write_bytes(marshal.dumps(code))
        written.replace(cached)
        return code


@functools.cache
def _cache() -> Path:
    """The directory of compiled modules, of this user, this interpreter and this version of the transformation."""
    version = hashlib.sha256(Path(__file__).read_bytes() + sys.version.encode()).hexdigest()[:16]
    directory = Path(tempfile.gettempdir()) / f"reworded-{os.getuid()}-{version}"
    directory.mkdir(mode=0o700, exist_ok=True)
    return directory


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] not in _PACKAGES:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.origin is None or type(spec.loader) is not SourceFileLoader:
            return spec
        if any(Path(spec.origin).is_relative_to(_PROJECT / package) for package in _PACKAGES):
            spec.loader = _Loader(fullname, spec.origin)
        return spec


def install() -> None:
    """Reword the messages of modules that this process imports from now on, and those of its child processes."""
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    if imported := [name for name in sys.modules if name.partition(".")[0] in _PACKAGES]:
        raise RuntimeError(f"{imported[0]} is imported already")
    sys.meta_path.insert(0, _Finder())
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if str(SITE) not in paths:
        os.environ["PYTHONPATH"] = os.pathsep.join([str(SITE), *filter(None, paths)])
