"""The architecture as a test: imports point one way, each kind of line has its room, and nothing is too big to read.

A *module* is written as its path below sparse_interp/, without `.py`: `corpus`, `model/sites`. The floors are those of
the layout in README.md, lowest first. A module may import its own room and lower floors, wherever in the file the
import stands.
"""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "sparse_interp"

FLOORS = [
    [{"errors", "axes", "results", "data_files"}],
    [{"corpus", "tokenizer"}],
    [{"model"}],
    [{"training"}, {"tasks"}],
    [{"interventions"}],
    [{"circuit"}],
    [{"faithfulness"}],
    [{"bridges"}],
    [{"viewer", "tokens", "figures", "gallery", "report"}],
    [{"sweeps", "cli"}],
]
"""Rooms by floor. Rooms of one floor do not import each other; the modules of one room may."""

PURE = {"viewer/content": set(), "viewer/page": {"errors", "viewer/content"}}
"""Modules that stand on floor 0 whatever their room, with all that they may import.

`viewer/page` turns the plain data of `viewer/content` into HTML and knows nothing of models or circuits. A `Circuit` on
floor 5 writes its own page through it; were it on floor 8 like the rest of its room, that arrow would point upwards.
"""

INDEX_READERS = {"cli", "sweeps"}
"""Rooms that may import from the index page; to all others that page stands above."""

LINES = [
    (r"(?<![\w.])print\(", {"cli"}, "only the command line prints; return a value or yield a record"),
    (r"""["']blocks\.""", {"model"}, "hook names are spelled in model/sites.py"),
    (r"\.backward\(", {"training", "interventions", "bridges"}, "gradients belong to training and pruning"),
    (r"\.cuda\(", set(), "the device follows the input; nobody calls .cuda()"),
    (r"os\.(environ|getenv)", {"cli", "model/zoo"}, "the environment is read by the command line and the zoo"),
    # model/transformer: `cfg.seed` is TransformerLens' own field, obeyed inside fork_rng, which restores what it seeded
    (r"torch\.manual_seed", {"cli", "model/transformer"}, "randomness comes in as a torch.Generator"),
    (r"np\.random\.|(?<!\w)random\.seed", {"cli"}, "randomness comes in as a torch.Generator"),
    (r"(import|from) matplotlib", {"results", "figures"}, "drawing goes through the primitives of results.py"),
    (r"from __future__ import annotations", set(), "annotations are checked while tests run, so they stay objects"),
]
"""What a line says, the rooms or modules that may say it, and why."""

LONGEST_FUNCTION = 60


def module_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").as_posix().removesuffix("/__init__")


def room_of(module: str) -> str:
    return module.split("/")[0]


def floor_of(module: str) -> int:
    if module in PURE:
        return 0
    return next((i for i, rooms in enumerate(FLOORS) if any(room_of(module) in room for room in rooms)), -1)


def may_import(importer: str, imported: str) -> bool:
    if imported == "__init__":
        return room_of(importer) in INDEX_READERS
    if importer in PURE:
        return imported in PURE[importer]
    here, there = floor_of(importer), floor_of(imported)
    same_room = any({room_of(importer), room_of(imported)} <= room for rooms in FLOORS for room in rooms)
    return there < here or same_room


@cache
def modules() -> dict[str, Path]:
    return {module_of(path): path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"}


def imports_of(source: str) -> set[str]:
    """Modules of ours that `source` imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports name their module in full, never by dots"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    ours = {name.replace(".", "/") for name in found if name.split(".")[0] == "sparse_interp"}
    below = {name.removeprefix("sparse_interp").removeprefix("/") for name in ours}
    return {name if name in modules() else name.rpartition("/")[0] or "__init__" for name in below}


every_module = pytest.mark.parametrize("module", modules())


@every_module
def test_a_module_belongs_to_a_room(module):
    assert floor_of(module) >= 0, f"{module} is in no room; the table in test_rooms.py lists them"
    assert not re.search(r"utils|common|helpers|misc", module), (
        f"{module}: a room without a noun; find what it is about"
    )


@every_module
def test_imports_point_down_the_floors(module):
    upward = [name for name in imports_of(modules()[module].read_text()) if not may_import(module, name)]
    assert not upward, f"{module} (floor {floor_of(module)}) imports {', '.join(upward)}"


def test_no_module_imports_itself_through_others():
    waiting = {module: imports_of(path.read_text()) & modules().keys() - {module} for module, path in modules().items()}
    while free := [module for module, needs in waiting.items() if not needs & waiting.keys()]:
        for module in free:
            del waiting[module]
    assert not waiting, f"a cycle runs through some of {', '.join(waiting)}"


@every_module
@pytest.mark.parametrize(("pattern", "rooms", "why"), LINES, ids=[pattern for pattern, _, _ in LINES])
def test_each_kind_of_line_has_its_room(module, pattern, rooms, why):
    if module in rooms or room_of(module) in rooms:
        return
    lines = modules()[module].read_text().splitlines()
    found = [f"{module}:{i}: {line.strip()}" for i, line in enumerate(lines, 1) if re.search(pattern, line)]
    assert not found, f"{why}\n" + "\n".join(found)


@every_module
def test_a_module_opens_with_what_it_is(module):
    source = modules()[module].read_text()
    assert not source.strip() or ast.get_docstring(ast.parse(source)), f"{module} has no docstring"


@every_module
def test_a_function_fits_on_a_screen(module):
    """Lines of the body, without the docstring."""
    long = []
    for node in ast.walk(ast.parse(modules()[module].read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            lines = body[-1].end_lineno - body[0].lineno + 1 if body else 0
            long += [f"{node.name} has {lines} lines"] * (lines > LONGEST_FUNCTION)
    assert not long, f"{module}: {', '.join(long)}; at most {LONGEST_FUNCTION}"


def fields_without_a_sentence(source: str) -> list[str]:
    """`Class.field` for each field of a configuration dataclass that no docstring follows."""
    bare = []
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.ClassDef) and node.name.endswith("Config")):
            continue
        for statement, after in zip(node.body, [*node.body[1:], None], strict=True):
            said = (
                isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and type(after.value.value) is str
            )
            if isinstance(statement, ast.AnnAssign) and not said:
                bare.append(f"{node.name}.{ast.unparse(statement.target)}")
    return bare


@every_module
def test_every_field_of_a_configuration_has_a_sentence(module):
    assert not fields_without_a_sentence(modules()[module].read_text())


def test_these_tests_see_what_they_look_for():
    assert imports_of("def f():\n    from sparse_interp.results import Table") == {"results"}
    assert imports_of("from sparse_interp import results") == {"results"}
    assert imports_of("import sparse_interp as si") == imports_of("from sparse_interp import load") == {"__init__"}
    assert not may_import("figures", "__init__")
    assert not may_import("training/loop", "tasks/task")
    assert not may_import("tasks/task", "training/loop")
    assert not may_import("model/layers", "circuit/graph")
    assert may_import("circuit/graph", "viewer/page")
    assert not may_import("viewer/page", "results")
    assert may_import("cli", "viewer/page")
    assert fields_without_a_sentence("class AConfig:\n    a: int\n    '''Said.'''\n    b: int") == ["AConfig.b"]
    assert re.search(LINES[0][0], "print('x')") and not re.search(LINES[0][0], "fingerprint(x)")
