"""Notebooks run from top to bottom, and show what is committed."""

import ast
import copy
import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
MACHINE_PATH = re.compile(r"(?:^|[^\w.~])/(?:work|farm|root|tmp|home|opt|mnt|Users)" + "/")

LINK = re.compile(r"\]\(([^)#\s]+)")

every_notebook = pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)


@pytest.fixture(scope="module")
def run() -> ModuleType:
    """`notebooks/run.py`, which is also `make notebooks`."""
    pytest.importorskip(
        "nbclient", reason="no nbclient, so no notebook was run (pip install 'sparse_interp[notebooks]')"
    )
    spec = importlib.util.spec_from_file_location("run", NOTEBOOKS / "run.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read(path: Path) -> Any:
    import nbformat

    return nbformat.read(path, as_version=4)


def code_of(path: Path) -> str:
    return "\n".join(cell.source for cell in read(path).cells if cell.cell_type == "code")


@every_notebook
def test_a_notebook_shows_what_is_committed(run, path):
    found = run.differences(read(path), run.executed(path))
    assert not found, f"{path.name}; make notebooks writes it anew:\n" + "\n".join(found)


@every_notebook
def test_a_notebook_is_committed_as_it_ran_once_through(path):
    cells = [cell for cell in read(path).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    assert not MACHINE_PATH.search(str([o for o in outputs if "<script" not in str(o)]))


@every_notebook
def test_a_notebook_ends_in_the_table_and_the_figure_that_carry_its_claim(path):
    *_, table, figure = [cell for cell in read(path).cells if cell.cell_type == "code"]
    assert any("<table" in str(output.get("data", {}).get("text/html")) for output in table.outputs)
    assert any("image/png" in output.get("data", {}) for output in figure.outputs)


@every_notebook
def test_a_notebook_opens_with_its_claim_and_speaks_of_what_there_is(path):
    import sparse_interp as si

    first, *_ = cells = read(path).cells
    assert first.source.startswith("# ") and first.source.count("**Claim.**") == 1
    spoken = {name for cell in cells for name in re.findall(r"\bsi\.([a-zA-Z]\w*)", cell.source)}
    assert not {name for name in spoken if not hasattr(si, name)}
    links = {link for cell in cells if cell.cell_type == "markdown" for link in LINK.findall(cell.source)}
    assert not {link for link in links if "://" not in link and not (NOTEBOOKS / link).exists()}


@pytest.mark.parametrize("stem", ["01_quickstart", "02_train", "05_edges_and_weights", "07_released_models"])
def test_the_code_of_a_notebook_is_public_names(stem):
    tree = ast.parse(code_of(NOTEBOOKS / f"{stem}.ipynb"))
    imports = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert [line for line in imports if "sparse_interp" in line] == ["import sparse_interp as si"]


def test_the_transformer_lens_notebook_asks_this_library_for_a_model_and_nothing_else():
    tree = ast.parse(code_of(NOTEBOOKS / "08_transformer_lens.ipynb"))
    imports = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert [line for line in imports if "sparse_interp" in line] == ["import sparse_interp as si"]
    used = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "si"]
    assert [node.attr for node in used] == ["load"]


# -- what counts as a difference ---------------------------------------------------------------------------------------


@pytest.fixture
def shown() -> Any:
    """A notebook of two cells: a sentence with numbers, and a picture of 4 x 3 pixels."""
    import nbformat

    picture = "iVBORw0KGgoAAAANSUhEUgAAAAQAAAADCAIAAAA7ljmRAAAAC0lEQVR4nGNgwAQAABUAAZg1fFQAAAAASUVORK5CYII="
    output = nbformat.v4.new_output
    cells = [nbformat.v4.new_code_cell("a"), nbformat.v4.new_code_cell("b")]
    cells[0].outputs = [output("stream", name="stdout", text="head L1H5 brings back 0.506, or -2.7e-03, of 412 tokens")]
    cells[1].outputs = [output("display_data", data={"image/png": picture, "text/plain": "<Figure>"})]
    return nbformat.v4.new_notebook(cells=cells)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("0.506", "0.507", None),
        ("0.506", "0.520", "0.520, and 0.506 is committed"),
        ("-2.7e-03", "-2.71e-03", None),
        ("-2.7e-03", "2.7e-03", "2.7e-03, and -2.7e-03 is committed"),
        ("412", "414", None),
        ("412", "430", "430, and 412 is committed"),
        ("L1H5", "L1H6", "L1H6"),
        ("brings", "takes", "head L1H5 takes"),
    ],
)
def test_words_are_compared_exactly_and_numbers_nearly(run, shown, old, new, words):
    now = copy.deepcopy(shown)
    now.cells[0].outputs[0].text = now.cells[0].outputs[0].text.replace(old, new)
    found = run.differences(shown, now)
    assert (not found) if words is None else (len(found) == 1 and words in found[0]), found


@pytest.mark.parametrize(("tolerance", "n_found"), [(0.01, 2), (0.2, 1), (None, 0)])
def test_a_cell_says_how_far_its_numbers_may_be_off(run, shown, tolerance, n_found):
    now = copy.deepcopy(shown)
    now.cells[0].metadata["tolerance"] = tolerance
    now.cells[0].outputs[0].text = now.cells[0].outputs[0].text.replace("0.506", "0.6").replace("412", "900")
    assert len(run.differences(shown, now)) == n_found


def test_a_cell_that_may_show_any_number_still_has_to_show_something(run, shown):
    now = copy.deepcopy(shown)
    now.cells[0].metadata["tolerance"], now.cells[0].outputs = None, []
    assert len(run.differences(shown, now)) == 1


def test_pictures_are_compared_by_number_and_size(run, shown):
    other, larger, gone = (copy.deepcopy(shown) for _ in range(3))
    data = shown.cells[1].outputs[0].data["image/png"]
    other.cells[1].outputs[0].data["image/png"] = data[:-12] + "AAAAAAAAAA=="
    larger.cells[1].outputs[0].data["image/png"] = data.replace("AAAAQAAAADC", "AAAAgAAAADC")
    gone.cells[1].outputs = []
    assert run.differences(shown, other) == []
    assert run.differences(shown, larger) == [
        "cell 1, image/png: a picture of (8, 3) pixels, and one of (4, 3) is committed"
    ]
    assert run.differences(shown, gone) == ["cell 1 shows nothing, and ['image/png', 'text/plain'] is committed"]


def test_what_carries_a_script_is_compared_by_its_size(run, shown):
    now = copy.deepcopy(shown)
    shown.cells[0].outputs[0].text = "<script>" + "a" * 1000
    for text, n_found in (("b" * 1000, 0), ("b" * 900, 1)):
        now.cells[0].outputs[0].text = "<script>" + text
        assert len(run.differences(shown, now)) == n_found


def test_a_notebook_that_is_not_there_is_named_before_any_other_runs(run, capsys):
    with pytest.raises(SystemExit):
        run.main([str(NOTEBOOKS / "01_quickstart.ipynb"), "9_nowhere.ipynb"])
    assert "no notebook 9_nowhere.ipynb; there are 01_quickstart.ipynb, " in capsys.readouterr().err
