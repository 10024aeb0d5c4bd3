"""The embedded corpus: English prose from the documentation strings of Python's standard library, numpy and torch.

The sources are parsed, never imported. One document is what one source module says; a paragraph that comes
again is kept once. Built in some ten seconds without network, and cached under a key of the packages' versions.
"""

import ast
import hashlib
import importlib.metadata
import importlib.util
import inspect
import logging
import platform
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

from stoker import files
from stoker.config import UserError
from stoker.data import cache
from stoker.progress import tracked

log = logging.getLogger(__name__)

BUILDER = 2  # raise it when other text comes out, or it is kept in another form
PACKAGES = ("numpy", "torch")
SKIPPED = frozenset({"test", "tests", "testing", "idlelib", "lib2to3", "site-packages", "_vendor", "__pycache__"})
SHORTEST = 40
SEPARATOR = "<|endoftext|>\n"


def missing() -> list[str]:
    """Packages that the corpus is made from and that are not installed, one line each."""
    return [
        f"--dataset pydocs is made from the documentation of {name}, which is not installed; install it: "
        f"pip install {name}"
        for name in PACKAGES
        if importlib.util.find_spec(name) is None
    ]


def build() -> str:
    """The corpus, its documents ended by `<|endoftext|>` lines; made when it is not in the cache yet.

    Raises UserError where a package is missing, or the disk refuses to keep it.
    """
    if problems := missing():
        raise UserError(*problems)
    return cache.text(files.home() / "pydocs" / f"{_key()}.txt", _gathered)


def _gathered() -> str:
    log.info("Gathering the documentation of %s (once)", ", ".join(_names()))
    return "".join(text + "\n" + SEPARATOR for text in gather(_roots()))


def gather(roots: Iterable[Path]) -> Iterator[str]:
    """One text for each module below the folders that says anything new, in the order of their paths."""
    modules = [module for root in roots for module in _modules(root)]
    seen: set[bytes] = set()
    sized = [(module.stat().st_size, module) for module in modules]
    for module in tracked(sized, "Reading documentation", sum(size for size, _ in sized), "bytes"):
        texts = [_new(prose(text), seen) for text in docstrings(module.read_bytes(), str(module))]
        if kept := [text for text in texts if len(text) >= SHORTEST]:
            yield "\n\n".join(kept)


def docstrings(source: bytes, name: str) -> Iterator[str]:
    """The documentation in one module's source, as it stands there; nothing where it does not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # other people's invalid escapes
            tree = ast.parse(source, name)
    except (SyntaxError, ValueError) as error:
        log.info("No documentation from %s: %s", name, error)
        return
    for node in _statements(tree):
        match node:
            case ast.Module() | ast.ClassDef() | ast.FunctionDef() | ast.AsyncFunctionDef():
                yield ast.get_docstring(node, clean=False) or ""
            case ast.Expr(value=ast.Call() as call) | ast.Assign(value=ast.Call() as call) if _adds_doc(call):
                yield from _strings(call)
            case ast.Assign(value=ast.Dict(values=values)):  # the topics of pydoc
                yield from (text for value in values for text in _strings(value) if text.count("\n") > 2)


def prose(docstring: str) -> str:
    """A docstring without what is not prose: doctests, literal blocks, directives, underlines, mark-up of words."""
    lines = inspect.cleandoc(docstring.replace(SEPARATOR.strip(), "")).splitlines()
    lines = [_unmarked(line) for line in _with_headings(_without_code(lines))]
    lines = [line for line in lines if not line.strip() or _is_prose(line)]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(_without_empty_headings(lines))).strip()


def _new(text: str, seen: set[bytes]) -> str:
    """The paragraphs that were not seen before; headings and other short ones may come again."""
    kept = []
    for paragraph in text.split("\n\n"):
        digest = hashlib.sha256(paragraph.strip().encode()).digest()
        if len(paragraph) < SHORTEST or digest not in seen:
            seen.add(digest)
            kept.append(paragraph)
    return "\n\n".join(kept)


# -- finding --------------------------------------------------------------------------------------------------------


def _names() -> list[str]:
    versions = [f"{name} {importlib.metadata.version(name)}" for name in PACKAGES]
    return [f"Python {platform.python_version()}", *versions]


def _key() -> str:
    return hashlib.sha256("|".join([str(BUILDER), *_names()]).encode()).hexdigest()[:24]


def _roots() -> list[Path]:
    roots = [Path(sysconfig.get_paths()["stdlib"])]
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.submodule_search_locations, name
        roots += map(Path, spec.submodule_search_locations)
    return roots


def _modules(root: Path) -> list[Path]:
    found = (path for path in root.rglob("*.py") if not SKIPPED & set(path.relative_to(root).parts))
    return sorted(path for path in found if path.is_file())


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """A module and all its statements, depth first; expressions are not looked into, which is most of a tree."""
    yield node
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.stmt, ast.ExceptHandler, ast.match_case)):
            yield from _statements(child)


def _adds_doc(call: ast.Call) -> bool:
    """add_docstr(...), add_newdoc(...) and their relatives, which document what is written in C."""
    match call.func:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return re.search("add_?(new)?doc", name) is not None
    return False


def _strings(node: ast.AST) -> Iterator[str]:
    """The string constants in an expression; in a template for `format`, the places to fill are taken out."""
    for each in ast.walk(node):
        match each:
            case ast.Constant(value=str(text)):
                yield re.sub(r"(?m)^[ \t]*\{\w+\}[ \t]*$", "", text).replace("{{", "{").replace("}}", "}")


# -- from mark-up to prose ------------------------------------------------------------------------------------------

WITH_PROSE = ("note", "warning", "tip", "important", "caution", "attention", "hint", "seealso", "admonition")
UNDERLINE = re.compile(r"\s*([-=~^*#+])\1{2,}\s*")


def _without_code(lines: Iterable[str]) -> Iterator[str]:
    """The lines outside doctests, literal blocks, comments, and directives that hold no prose."""
    block: int | None = None  # the indentation of what opened the block that is being left out
    in_doctest = False
    for line in lines:
        bare, indent = line.strip(), len(line) - len(line.lstrip())
        if not bare:
            in_doctest = False
            yield ""
            continue
        if block is not None and indent > block:
            continue
        block = None
        in_doctest = in_doctest or bare.startswith(">>>")
        if in_doctest:
            continue
        if bare.startswith(".. "):
            directive = re.fullmatch(r"\.\. ([\w-]+)::\s*(.*)", bare)
            if directive and directive[1] in WITH_PROSE:
                yield " " * indent + directive[2]
            else:
                block = indent
            continue
        if bare.endswith("::"):
            block = indent
            line = line.rstrip()[:-1]
        yield line


def _with_headings(lines: Iterable[str]) -> Iterator[str]:
    """Underlined headings end in a colon instead."""
    before = ""
    for line in lines:
        if UNDERLINE.fullmatch(line):
            before = before.rstrip(": ") + ":" if before.strip() else ""
            continue
        yield before
        before = line
    yield before


MARKUP = [
    (re.compile(r"\s?\[[#*]?\w*\]_"), ""),  # footnotes
    (re.compile(r":[\w:+-]+:`~[\w.]*?(\w+)`"), r"\1"),  # :class:`~torch.nn.Linear`
    (re.compile(r":[\w:+-]+:`([^`<]+?)(?:\s*<[^`>]*>)?`"), r"\1"),  # :ref:`the text <target>`
    (re.compile(r"``([^`]+)``"), r"\1"),
    (re.compile(r"`([^`<]+?)(?:\s*<[^`>]*>)?`_{0,2}"), r"\1"),
    (re.compile(r"\*\*(\w[^*]*)\*\*"), r"\1"),
    (re.compile(r"(?<![\w*])\*(\w(?:[^*]*\w)?)\*(?![\w*])"), r"\1"),
    (re.compile(r"^(\s*):(?:param|parameter|arg|type|keyword|var|ivar)s? ([^:]+):"), r"\1\2:"),
    (re.compile(r"^(\s*):(returns?|rtype|raises?|yields?)\b([^:]*):"), r"\1\2\3:"),
    (re.compile(r"\\\w+\{([^{}]*)\}"), r"\1"),  # \text{in} of a formula
    (re.compile(r"\\(?=[*_|`\s])"), ""),
]


def _unmarked(line: str) -> str:
    for pattern, replacement in MARKUP:
        line = pattern.sub(replacement, line)
    return line.rstrip()


def _is_prose(line: str) -> bool:
    """Letters and spaces mostly: no printed arrays, tables, grammars or formulas."""
    bare = line.strip()
    if bare.startswith("|") or "::=" in bare:
        return False
    return sum(each.isalpha() or each == " " for each in bare) >= 0.7 * len(bare)


def _without_empty_headings(lines: list[str]) -> list[str]:
    """Lines ending in a colon go where nothing is left below them."""
    kept: list[str] = []  # from the last line to the first
    below = ""
    for line in reversed(lines):
        if not line.strip():
            kept.append("")
            continue
        deeper = below and len(below) - len(below.lstrip()) > len(line) - len(line.lstrip())
        if line.endswith(":") and not deeper and (not below or below.endswith(":")):
            continue
        kept.append(line)
        below = line
    return kept[::-1]
