"""The shape of the package: imports point one way, and importing only defines names (docs/design.md)."""

import ast
import itertools
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import retcon

ROOT = Path(retcon.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

LEVELS = [
    {
        "errors",
        "lazily",
        "extensions",
        "version",
        "plural",
        "work",
        "escaping",
        "seed",
        "atomic",
        "files",
        "drawing",
        "pages",
        "chat",
        "arguments",
        "boundary",
        "spelling",
        "edits",
        "shared_cache",
        "checked",
        "attachment",
        "delta",
        "world",
    },
    {"lm"},
    {"memory"},
    {"training"},
    {"locate"},
    {"evaluation"},
    {"methods"},
    {"export", "audit"},
    {"store"},
    {"cluster"},
    {"workflow"},
    {"bench"},
    {"web"},
    {"cli", "__main__"},
]
BASE = [
    *("errors", "lazily", "extensions", "version", "work", "escaping", "seed", "atomic", "files", "drawing", "pages"),
    *("plural", "chat", "arguments", "boundary", "spelling", "edits", "shared_cache", "checked", "attachment", "delta"),
]
"""The order inside the first level; `world` may use the first three."""


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path) for path in FILES}


def imports(path: Path, *, top_level_only: bool = False) -> Iterator[str]:
    """Modules of retcon that a file imports, those under TYPE_CHECKING left out."""
    tree = ast.parse(path.read_text())
    skipped = {
        inner for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }  # fmt: skip
    inside = {
        inner for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) for inner in ast.walk(node)
    } if top_level_only else set()  # fmt: skip
    for node in ast.walk(tree):
        if node in skipped or node in inside:
            continue
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names if a.name.split(".")[0] == "retcon"]
            yield from (name for name in names if name != "retcon")
            if "retcon" in names:  # then what is taken from it
                yield from {ast.unparse(n) for n in ast.walk(tree) if is_of_the_face(n)}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            if (node.module or "").split(".")[0] == "retcon":
                for alias in node.names:
                    full = f"{node.module}.{alias.name}"
                    yield full if full in MODULES or node.module == "retcon" else str(node.module)


def is_of_the_face(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "retcon"


def level(name: str) -> int:
    part = name.split(".")[1]
    found = [i for i, names in enumerate(LEVELS) if part in names]
    assert found, f"{name}: no place in the order of imports; add it to LEVELS and to docs/design.md"
    return found[0]


@pytest.mark.parametrize("path", [f for f in FILES if f.parent != ROOT or f.name != "__init__.py"], ids=module_name)
def test_imports_point_one_way(path: Path) -> None:
    name = module_name(path)
    for found in imports(path):
        if found == "retcon.__version__":
            continue
        if found.removeprefix("retcon.") in retcon.__all__:
            assert level(name) == len(LEVELS) - 1, f"{name} uses the public face; import from where {found} is defined"
            continue
        assert level(found) <= level(name), f"{name} imports {found}, which stands above it"
        if level(name) == level(found) == 0:
            one, two = name.split(".")[1], found.split(".")[1]
            if one in BASE:
                assert two in BASE[: BASE.index(one) + 1], f"{name} imports {found}"
            else:
                assert two in ("world", "errors", "files", "edits"), f"{name} imports {found}"


def test_the_map_in_the_docs_is_in_this_order() -> None:
    known = set().union(*LEVELS)
    drawn = (ROOT.parents[1] / "docs/design.md").read_text().partition("## Where things are")[2].split("```")[1]
    lines = [[word.rstrip("/") for word in line.split()] for line in drawn.splitlines()]
    found = [list(itertools.takewhile(known.__contains__, line)) for line in lines]
    assert [set(names) for names in found if names] == [names - {"__main__"} for names in LEVELS]
    assert next(filter(None, found)) == [*BASE, "world"]


def test_nothing_imports_the_recipes() -> None:
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            named = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            named += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in named if name.split(".")[0] == "recipes"], path


def test_no_module_imports_in_a_circle() -> None:
    """At import time, that is: an import inside a function may look back at its own level."""
    uses = {module_name(f): {i for i in imports(f, top_level_only=True) if i != module_name(f)} for f in FILES}
    finished: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, f"imports in a circle: {' -> '.join((*above, name))}"
        if name in finished:
            return
        for found in uses.get(name, ()):
            if not name.startswith(found + "."):
                visit(found, (*above, name))
        finished.add(name)

    for name in uses:
        if name != "retcon":
            visit(name, ())


ACTING = ("print", "open", "torch.manual_seed", "random.seed", "logging.", "warnings.", "os.environ")


def test_nothing_seeds_logs_or_prints_at_the_top_level() -> None:
    for path in FILES:
        for node in ast.parse(path.read_text()).body:
            calls = {ast.unparse(c.func) for c in ast.walk(node) if isinstance(c, ast.Call)}
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.If):
                continue
            for call in calls:
                assert not call.startswith(ACTING), f"{path}: {call} runs on import"


def test_only_the_command_line_prints() -> None:
    for path in FILES:
        calls = {ast.unparse(c.func) for c in ast.walk(ast.parse(path.read_text())) if isinstance(c, ast.Call)}
        assert "print" not in calls or path.is_relative_to(ROOT / "cli"), path


def test_no_star_imports() -> None:
    for path in FILES:
        assert "import *" not in path.read_text(), path


def test_every_script_of_benchmarks_has_its_reason() -> None:
    top = ROOT.parents[1]
    scripts = {path.stem for path in (top / "benchmarks").glob("*.py")} - {"__init__", "common"}
    named = set(re.findall(r"`(\w+)`", (top / "docs/design.md").read_text()))
    assert scripts <= named, f"say in docs/design.md why no bench file does it: {scripts - named}"


NO_VERBS = {
    *("The", "A", "An", "One", "What", "Whether", "How", "Where", "Which", "Who", "Whose", "Of", "As", "By", "All"),
    *("Each", "Every", "Some", "Both", "No", "Those", "Its", "It", "Raises", "Returns"),
}


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_docstrings_say_what_a_function_does_and_name_its_arguments(path: Path) -> None:
    """By a verb, for all but properties; and under `Args:` there is nothing that the function does not take."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or not (text := ast.get_docstring(node)):
            continue
        made_by = node if isinstance(node, ast.FunctionDef) else next(
            (n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None
        )  # fmt: skip
        listed = re.findall(r"^    (\w+(?:, \w+)*):", text.partition("Args:\n")[2].partition("\n\n")[0], re.MULTILINE)
        if listed and made_by is not None:
            taken = {a.arg for a in ast.walk(made_by.args) if isinstance(a, ast.arg)}
            assert set(", ".join(listed).split(", ")) <= taken, (
                f"{path}: {node.name} lists other arguments than it takes"
            )
        decorators = " ".join(map(ast.unparse, node.decorator_list))
        if isinstance(node, ast.FunctionDef) and "property" not in decorators and not node.name.startswith("__"):
            assert text.split()[0] not in NO_VERBS, f"{path}: the docstring of {node.name} begins without a verb"


# --- the public face -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", retcon.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(retcon, name) is not None
    assert name in dir(retcon)


def test_the_lists_of_public_names_agree() -> None:
    assert sorted(retcon.__all__, key=str.lower) == sorted(set(retcon.__all__), key=str.lower)
    packages = {p.name for p in ROOT.iterdir() if p.is_dir()} | {p.stem for p in ROOT.glob("*.py")}
    assert not packages & set(retcon.__all__), "a public name must not hide a sub-package"
    with pytest.raises(AttributeError, match="module 'retcon' has no attribute 'nothing'"):
        _ = retcon.nothing


STATE = """
import json, locale, logging, os, random, signal, sys, threading, warnings

def state():
    return {
        "environ": dict(os.environ),
        "random": repr(random.getstate()),
        "filters": repr(warnings.filters),
        "handlers": repr(logging.getLogger().handlers) + str(logging.getLogger().level),
        "hooks": repr((sys.excepthook, sys.displayhook, sys.meta_path, sys.path_hooks, threading.excepthook)),
        "signals": repr([signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]),
        "locale": locale.setlocale(locale.LC_ALL),
        "cwd": os.getcwd(),
        "recursion": sys.getrecursionlimit(),
        "threads": threading.active_count(),
    }
"""


def in_a_fresh_python(code: str) -> dict[str, object]:
    run = subprocess.run([sys.executable, "-c", STATE + code], capture_output=True, text=True, check=True, timeout=60)
    assert run.stderr == ""
    (line,) = run.stdout.splitlines()  # nothing else is printed
    return json.loads(line)


def test_importing_is_light_and_changes_nothing() -> None:
    found = in_a_fresh_python(
        "before = state()\nimport retcon\nafter = state()\n"
        "print(json.dumps({'changed': [k for k in before if before[k] != after[k]], 'modules': sorted(sys.modules)}))"
    )
    assert found["changed"] == []
    heavy = {"torch", "transformers", "numpy", "typer", "rich", "safetensors", "jaxtyping", "peft", "datasets"}
    assert not heavy & set(found["modules"])  # type: ignore[call-overload]


def test_importing_everything_does_not_load_transformers_or_touch_the_seeds() -> None:
    modules = [
        name for f in FILES
        if not (name := module_name(f)).startswith(("retcon.__main__", "retcon.cli"))
    ]  # fmt: skip
    found = in_a_fresh_python(
        "import torch, typer, rich\n"
        "seeds = torch.get_rng_state().tolist()\nmodes = (torch.is_grad_enabled(), torch.get_default_dtype())\n"
        "before = state()\n"
        f"import importlib\nfor name in {modules}:\n    importlib.import_module(name)\n"
        "after = state()\n"
        "print(json.dumps({'changed': [k for k in before if before[k] != after[k]],"
        " 'seeds': seeds == torch.get_rng_state().tolist(),"
        " 'modes': modes == (torch.is_grad_enabled(), torch.get_default_dtype()),"
        " 'transformers': 'transformers' in sys.modules}))"
    )
    assert found == {"changed": [], "seeds": True, "modes": True, "transformers": False}
