"""The house: names of scripts, direction of imports, sizes."""

import ast
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "train" / "interlace"
WINGS = ["data", "model", "inference", "training"]  # each may import those to its left


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("interlace"):
            found |= {node.module} | {f"{node.module}.{name.name}" for name in node.names}
        elif isinstance(node, ast.Import):
            found |= {name.name for name in node.names if name.name.startswith("interlace")}
    modules = {".".join(file.relative_to(ROOT / "train").with_suffix("").parts) for file in PACKAGE.rglob("*.py")}
    return found & modules


def test_scripts_do_not_shadow_installed_modules() -> None:
    scripts = {path.stem for path in (ROOT / "train").glob("*.py")}
    assert scripts
    assert not scripts & (set(sys.stdlib_module_names) | set(packages_distributions()))


def test_a_wing_imports_only_wings_below_it() -> None:
    for wing in WINGS:
        allowed = WINGS[: WINGS.index(wing) + 1]
        for path in (PACKAGE / wing).glob("*.py"):
            used = {module.split(".")[1] for module in imports(path) if module.count(".") >= 2}
            assert used <= set(allowed), f"{path.relative_to(ROOT)} imports {used - set(allowed)}"


def test_no_module_imports_itself_in_a_circle() -> None:
    graph = {".".join(path.relative_to(ROOT / "train").with_suffix("").parts): imports(path) for path in PACKAGE.rglob("*.py")}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail, module))
        if module not in done:
            for other in graph.get(module, ()):
                visit(other, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_scripts_are_outlines_and_modules_stay_small() -> None:
    for path in (ROOT / "train").rglob("*.py"):
        limit = 120 if path.parent.name == "train" else 350
        assert len(path.read_text().splitlines()) <= limit, path.relative_to(ROOT)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                assert (node.end_lineno or 0) - node.lineno < 60, f"{path.relative_to(ROOT)}: {node.name}"


def test_no_sys_path_code() -> None:
    for path in [*(ROOT / "train").rglob("*.py"), *(ROOT / "data").rglob("*.py")]:
        assert "sys.path" not in path.read_text(), path.relative_to(ROOT)
