"""The import rule of the house, read from the source: which room may import which, and no module in a circle.

Modules of the package are called by their names within it: `config`, `daemon.rundir`.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src"

BASE = {"command", "config", "files", "progress", "sharing", "wheels"}
CORE = {"training.core", "training.trainer"}
ASSEMBLY = {"training.assembly"}

# Who may import what of ours; a package stands for all that is in it. The first line that fits a module counts.
RULE: list[tuple[set[str], set[str]]] = [
    ({"command"}, {"config", "sharing"}),
    ({"__main__"}, {"command", "config", "files", "daemon"}),
    (BASE, set()),
    ({"daemon"}, {"command", "config", "files", "daemon"}),
    ({"environment"}, {"command", "config", "daemon.rundir", "environment"}),
    ({"model"}, {"config", "wheels", "model"}),
    ({"data"}, BASE | {"data"}),
    (CORE, BASE | {"daemon", "data.loader", "data.workers", "data.sources.model_hub"} | CORE),
    ({"training.callbacks"}, {"config", "files", "daemon", "training.callbacks"} | CORE),
    ({"monitors"}, {"config", "files", "daemon", "monitors", "data.sources.network"} | CORE),
    (ASSEMBLY, BASE | {"daemon", "environment", "data.loader", "training.callbacks", "monitors"} | CORE | ASSEMBLY),
    ({"inference"}, BASE | {"daemon", "model", "data", "inference"} | CORE),
]
LATE = {("progress", "tqdm"), ("wheels", "torch")}  # what the ground floor imports where it is needed
FACADE = "training"  # `from stoker.training import Stage`
STAGE_FILES = ("training.train_", "training.sft_", "training.stages")
ABOVE_STAGES = BASE | {"daemon", "model", "data", "training.callbacks", "monitors"} | CORE | ASSEMBLY


@dataclass(frozen=True)
class Import:
    module: str  # `from stoker.data import loader` is data.loader, `from stoker.config import opt` is config
    line: int
    late: bool  # inside a function, or for type checkers only
    for_types: bool


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")


def _within_package(name: str) -> str:
    return name.removeprefix("stoker.")


MODULES = {module_name(path): path for path in sorted(SOURCE.rglob("*.py"))}
OURS = {name.partition(".")[0] for name in MODULES}


def imports(path: Path) -> Iterator[Import]:
    def walk(node: ast.AST, late: bool, for_types: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from (Import(_within_package(alias.name), node.lineno, late, for_types) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.name}:{node.lineno}: relative import"
            assert node.module
            for alias in node.names:
                inner = _within_package(f"{node.module}.{alias.name}")
                yield Import(inner if inner in MODULES else _within_package(node.module), node.lineno, late, for_types)
        else:
            for_types = for_types or _for_types(node)
            late = late or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or for_types
            for child in ast.iter_child_nodes(node):
                yield from walk(child, late, for_types)

    return walk(ast.parse(path.read_text()), False, False)


def _for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def within(module: str, allowed: set[str]) -> bool:
    return any(module == name or module.startswith(name + ".") for name in allowed)


def allowed_for(module: str) -> set[str] | None:
    if module.startswith(STAGE_FILES):
        return ABOVE_STAGES | {module, "training.stages"}
    return next((allowed for members, allowed in RULE if within(module, members)), None)


def test_the_walk_sees_every_kind_of_import(tmp_path: Path) -> None:
    path = tmp_path / "example.py"
    path.write_text("import stoker.daemon.journal\nfrom stoker.data.text import corpus, tokens as t\n"
                    "from stoker.config import opt\nfrom stoker import files\n"
                    "if TYPE_CHECKING:\n    from stoker.training.trainer import Trainer\n"
                    "class A:\n    def f():\n        import tqdm\ntry:\n    import torch.nn as nn\nfinally: pass\n")
    assert [(found.module, found.late) for found in imports(path)] == [
        ("daemon.journal", False), ("data.text.corpus", False), ("data.text.tokens", False), ("config", False),
        ("files", False),
        ("training.trainer", True), ("tqdm", True), ("torch.nn", False),
    ]
    assert len(MODULES) > 40


@pytest.mark.parametrize("module", [name for name in MODULES if not MODULES[name].name == "__init__.py"])
def test_imports_keep_to_the_rule(module: str) -> None:
    allowed = allowed_for(module)
    assert allowed is not None, f"{module} has no place in the rule yet: give it one"
    for found in imports(MODULES[module]):
        if found.module.partition(".")[0] in OURS:
            assert within(found.module, allowed), f"{module}, line {found.line}: may not import {found.module}"


def test_packages_import_nothing_by_themselves() -> None:
    """But for the one that collects what plug-ins need, whose modules need neither torch nor anything else."""
    for name, path in MODULES.items():
        found = {one.module for one in imports(path)} if path.name == "__init__.py" else set()
        assert not found or (name == FACADE and found <= {"config"} | {m for m in MODULES if within(m, CORE)}), path


def test_no_module_of_ours_imports_from_what_plug_ins_import() -> None:
    """It is run before any module below it, while what it imports from them is not there yet."""
    for name, path in MODULES.items():
        assert FACADE not in {found.module for found in imports(path)}, name


@pytest.mark.parametrize("module", [name for name in MODULES if within(name, BASE | {"daemon", "environment"})])
def test_the_ground_floor_needs_the_standard_library_only(module: str) -> None:
    for found in imports(MODULES[module]):
        top = found.module.partition(".")[0]
        if top not in OURS and top not in sys.stdlib_module_names:
            assert (module, top) in LATE and found.late, f"{module}: {found.module}"


def test_no_module_shadows_the_standard_library() -> None:
    """A script's own folder may come first in the path; then its neighbours hide what is called the same."""
    names = {path.stem for path in MODULES.values()} | {path.parent.name for path in MODULES.values()}
    assert not names & sys.stdlib_module_names


def test_files_stay_readable() -> None:
    lengths = {name: len(path.read_text().splitlines()) for name, path in MODULES.items()}
    assert not {name: length for name, length in lengths.items() if length > 500}
    assert lengths["training.trainer"] <= 400


def test_nothing_installed_is_loaded_by_the_ground_floor_nor_by_a_stage() -> None:
    """In a Python without installed packages, so that an import of one would fail."""
    modules = [name for name in MODULES
               if within(name, BASE | {"daemon", "environment"}) or name.startswith(STAGE_FILES)]
    modules.append("training.assembly.launch")
    assert "daemon.__main__" in modules and "training.train_lm" in modules
    subprocess.run([sys.executable, "-S", "-c", f"import {', '.join(f'stoker.{name}' for name in modules)}"],
                   check=True, env={"PYTHONPATH": str(SOURCE.parent / "run/python")})


def test_no_module_is_in_a_circle() -> None:
    """Imports for type checkers aside: a callback has to know what a trainer is called. A package runs before what is
    in it: for the one that imports from there that is a circle, which another test keeps harmless."""
    imported = {name: {found.module for found in imports(path) if found.module in MODULES and not found.for_types}
                for name, path in MODULES.items()}
    for name, needs in imported.items():
        packages = {parent for module in needs for parent in MODULES if module.startswith(f"{parent}.")}
        needs |= packages - {FACADE}
    settled: set[str] = set()
    while free := {name for name, needs in imported.items() if name not in settled and needs <= settled | {name}}:
        settled |= free
    assert settled == imported.keys(), f"circles among {sorted(imported.keys() - settled)}"
