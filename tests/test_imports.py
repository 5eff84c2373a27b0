"""Imports go one way: dola_runtime <- generation_inference <- commands, and janus/ below the root scripts."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = {path.stem for path in ROOT.glob("*.py")}
OURS = SCRIPTS | {"janus", "tools", "benchmarks", "tests", "conftest"}
LIBRARY = [path for path in sorted(ROOT.glob("janus/**/*.py")) if path.name != "__main__.py"]
COMMANDS = sorted(ROOT.glob("janus/**/__main__.py"))


def imported(path: Path, at_the_top: bool = False) -> set[str]:
    """The modules of ours that a file imports, as `a.b.c`; `at_the_top` is what importing the file imports."""

    def walk(node: ast.AST) -> Iterator[ast.AST]:
        yield node
        for child in ast.iter_child_nodes(node):
            later = isinstance(child, ast.FunctionDef) or (isinstance(child, ast.If) and "__main__" in ast.dump(child))
            if not (at_the_top and later):
                yield from walk(child)

    names = set()
    for node in walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}: a relative import"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name for name in names if name.split(".")[0] in OURS}


def test_the_arithmetic_imports_nothing_of_ours():
    assert imported(ROOT / "dola_runtime.py") == set()


def test_painting_needs_the_arithmetic_alone_and_looks_for_the_rest_where_it_uses_it():
    names = {name.split(".")[0] for name in imported(ROOT / "generation_inference.py", at_the_top=True)}
    assert names == {"dola_runtime"}
    assert {name.split(".")[0] for name in imported(ROOT / "generation_inference.py")} == {"dola_runtime", "janus"}


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_library_module_imports_no_root_script_but_the_arithmetic(path: Path):
    assert {name.split(".")[0] for name in imported(path)} <= {"dola_runtime", "janus"}
    assert not any(name.split(".")[-1] == "__main__" for name in imported(path))


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_command_inside_janus_imports_no_root_script_but_the_two_that_an_installation_has(path: Path):
    assert {name.split(".")[0] for name in imported(path)} <= {"dola_runtime", "generation_inference", "janus"}


def test_the_model_knows_nothing_of_dola():
    for path in sorted(ROOT.glob("janus/models/*.py")):
        names = imported(path)
        assert not any(name.split(".")[0] == "dola_runtime" for name in names), path


def test_the_modules_of_the_layer_search_build_on_the_ones_before():
    modules = ["examples", "tasks", "metrics", "report", "survivors", "__main__"]
    for i, module in enumerate(modules):
        names = imported(ROOT / "janus" / "dola" / "layer_search" / f"{module}.py")
        assert not names & {f"janus.dola.layer_search.{later}" for later in modules[i:]}
