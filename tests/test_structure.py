"""The rules of the house, held by ast: arrows, sizes, no prints, no environment, one broad except."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "qtool").rglob("*.py"))
NATIVE = sorted([*(ROOT / "qtool" / "csrc").glob("*"), *(ROOT / "kernels_cuda").glob("*")])

# who may import whom: a file may import from ranks below its own, and siblings only where named
RANKS = {
    "errors": 0, "moments": 1, "tensors": 1, "recipe": 1, "found": 1, "heap": 1, "quality": 1, "units": 1,
    "hadamard": 1, "allocate": 1, "devices": 1, "mixtures": 1, "safe_yaml": 1, "escape": 1, "storage": 1, "failures": 2,
    "files": 1, "explained": 1, "activations": 2, "ops": 2, "grids": 3, "layer": 3, "repairs": 4,
    "methods": 4, "formats": 4, "models": 4, "checkpoint": 4,
    "manifest": 5, "stages": 5, "estimate": 5, "decode": 5, "budget": 5, "rotate": 5, "plan": 5, "plan_gguf": 5,
    "plan_learning": 5, "group_sizes": 5, "learned": 1,
    "journal": 5, "manifest_schema": 5, "workspace": 6, "outside": 6, "stream": 6, "rescale": 6, "outliers": 6,
    "card": 6, "report": 6, "sensitivity": 6, "heatmap": 6, "records": 6,
    "container": 6, "onnx_graph": 6, "transfer": 6, "footprint": 6, "report_eval": 6, "runtime": 6,
    "pipeline": 7, "packing": 6, "inspect": 7, "html_report": 7, "evaluate": 7, "export": 7, "export_gguf": 7,
    "export_onnx": 7, "export_imatrix": 7, "export_text": 7, "gguf_codes": 6, "arithmetic": 6,
    "processes": 1, "lock": 1, "on_ray": 6, "outputs": 6, "prepare": 6, "jobs": 7, "push": 7,
    "requantize": 8, "inspecting": 8, "evaluating": 8, "console": 8, "exports": 8, "options": 8, "flags": 7, "cli": 9,
    "duration": 6, "preflight": 6, "report_plan": 6, "probe": 8, "keeping": 5, "kept": 6, "reading": 6, "trials": 6,
    "redo": 8, "redoing": 8, "quantizing": 9, "independent": 1, "digests": 5, "verifying": 8, "ahead": 1,
    "resuming": 7, "retype": 7, "learning": 7, "begun": 1, "following": 5, "repacking": 5,
    "__main__": 10, "__init__": 10,
}
SEPARATE = ("methods", "formats", "models", "checkpoint")  # never import each other


def part_of(path: Path) -> str:
    inside = path.relative_to(ROOT / "qtool").parts
    return inside[0].removesuffix(".py")


def imports(tree: ast.AST) -> set[str]:
    """The parts of qtool that a file imports."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("qtool.")}
        elif isinstance(node, ast.ImportFrom) and node.module == "qtool":
            found |= {alias.name for alias in node.names if alias.name in RANKS}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("qtool."):
            found.add(str(node.module).split(".")[1])
    return found


def is_broad(node: ast.ExceptHandler) -> bool:
    return node.type is None or (isinstance(node.type, ast.Name) and node.type.id in ("Exception", "BaseException"))


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_file_keeps_the_rules(path: Path) -> None:
    tree, part = parsed(path), part_of(path)
    assert part in RANKS, f"{path}: give the new part a rank in this test and a line in docs/design.md"
    lines = path.read_text(encoding="utf-8").count("\n")
    assert lines <= 400, f"{path} has {lines} lines"
    for imported in imports(tree):
        assert RANKS[imported] <= RANKS[part], f"{path} imports {imported}, which lies above it"
        assert imported == part or part not in SEPARATE or imported not in SEPARATE, f"{path} imports {imported}"
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= 60, f"{path}: {node.name} has {length} lines"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os":
            assert node.attr not in ("environ", "getenv"), f"{path}:{node.lineno} reads the environment"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            assert part == "console", f"{path}:{node.lineno} prints"
        if isinstance(node, ast.ExceptHandler):
            assert not is_broad(node) or part == "cli", f"{path}:{node.lineno} catches everything"


def test_one_broad_except() -> None:
    handlers = [node for path in FILES for node in ast.walk(parsed(path))
                if isinstance(node, ast.ExceptHandler) and is_broad(node)]
    assert len(handlers) == 1


def test_the_second_decoders_share_nothing_with_the_first() -> None:
    files = [path for path in FILES if part_of(path) == "independent"]
    assert len(files) > 8 and set().union(*(imports(parsed(path)) for path in files)) == {"independent", "errors"}


def test_typer_and_transformers_stay_in_their_place() -> None:
    for path in FILES:
        modules = {alias.name.split(".")[0] for node in ast.walk(parsed(path)) if isinstance(node, ast.Import)
                   for alias in node.names}
        modules |= {str(node.module).split(".")[0] for node in ast.walk(parsed(path))
                    if isinstance(node, ast.ImportFrom)}
        if "typer" in modules:
            assert path.name in ("cli.py", "options.py")
        if "transformers" in modules:
            assert part_of(path) in ("models", "pipeline") or path.name == "gguf_file.py", path


def test_inheritance_is_shallow() -> None:
    parents = {node.name: [base.id for base in node.bases if isinstance(base, ast.Name)]
               for path in FILES for node in ast.walk(parsed(path)) if isinstance(node, ast.ClassDef)}

    def depth(name: str) -> int:
        return 1 + max((depth(base) for base in parents.get(name, [])), default=0) if name in parents else 0

    deep = {name: depth(name) for name in parents if depth(name) > 3}  # QtoolError -> InputError -> PlanError
    assert not deep


@pytest.mark.parametrize("path", NATIVE, ids=lambda path: path.name)
def test_native_files_stay_small(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 400
    if "bindings" not in path.name:
        assert "torch/" not in text, f"{path.name}: only bindings know torch"


def test_every_package_is_installed() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    folders = {".".join(path.parent.relative_to(ROOT).parts) for path in FILES if path.name == "__init__.py"}
    assert folders == set(listed) - {"qtool.recipes"}  # those are YAML, from a folder beside the package
