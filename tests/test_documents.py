"""The documents are true: README's code runs, its map names what is there, and no page knows whose machine it is on."""

import json
import re
import shlex
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

PROJECT = Path(__file__).parents[1]
PACKAGE = PROJECT / "sparse_interp"
README = (PROJECT / "README.md").read_text()
NOT_ON_THE_MAP = {".git", ".gitignore", ".ci", ".venv", "out", "dist", "build"}
MACHINE_PATH = re.compile(r"(?:^|[^\w.~])/(?:work|farm|root|tmp|home|opt|mnt|Users)" + "/")


def blocks(language: str) -> list[str]:
    """Fenced blocks of README in `language`, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)


def map_of_the_readme() -> dict[str, str]:
    """Path -> remark for each line of the map; the package's own files are indented below its name."""
    (tree,) = [block for block in blocks("") if "sparse_interp/\n" in block]
    folder, remarks = "", {}
    for line in tree.splitlines():
        if line == "sparse_interp/":
            folder = line
        elif not line.startswith("  --"):
            path, _, remark = line.strip().partition(" ")
            remarks[folder + path] = remark.strip()
    return remarks


def package_files() -> set[str]:
    """Files of the package as the map names them: a room's `__init__.py` is left out, vendored files are one entry."""
    found = set()
    for path in PACKAGE.rglob("*"):
        name = path.relative_to(PROJECT).as_posix()
        if "/vendor/" in name:
            found.add(name.split("/vendor/")[0] + "/vendor/")
        elif path.is_file() and "__pycache__" not in path.parts and not name.endswith(("/__init__.py", ".nbi", ".nbc")):
            found.add(name)
    return found | {"sparse_interp/__init__.py"}


def test_the_map_names_every_file_of_the_package_and_no_other():
    named = {path for path in map_of_the_readme() if path.startswith("sparse_interp/")}
    missing, gone = sorted(package_files() - named), sorted(named - package_files())
    assert not missing, f"README's map lacks {', '.join(missing)}"
    assert not gone, f"README's map names {', '.join(gone)}, which is not there"


def test_the_map_names_everything_beside_the_package_and_nothing_else():
    named = {path.rstrip("/") for path in map_of_the_readme() if not path.startswith("sparse_interp/")}
    there = (
        {path.name for path in PROJECT.iterdir() if not path.name.startswith(".")} - {"sparse_interp"} - NOT_ON_THE_MAP
    )
    assert named == there


def test_every_place_on_the_map_has_a_remark():
    assert not [path for path, remark in map_of_the_readme().items() if not remark]


def test_readme_opens_with_the_two_commands():
    assert [line.split("#")[0].strip() for line in blocks("")[0].splitlines()] == ["make demo", "make test"]
    assert README.index("make demo") < README.index("## ")


def test_the_commands_of_the_readme_are_targets_of_the_makefile():
    makefile = (PROJECT / "Makefile").read_text()
    for target in set(re.findall(r"(?:^|`)make (\w+)", README, flags=re.MULTILINE)):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), f"README speaks of `make {target}`"


# ---------------------------------------------------------------- code

LITTLE = {"n_steps": 10, "batch_size": 4, "n_train": 32, "n_selection": 16, "max_kl": 1.9, "max_loss_gap": 4.0}
"""A search that is soon content."""

CODE = re.compile(
    r"(?:^<!-- not run: (?P<reason>[^>]+) -->\n)?^```python\n(?P<code>.*?)^```$"
    r"(?:\n\n^```text\n(?P<printed>.*?)^```$)?",
    flags=re.DOTALL | re.MULTILINE,
)
"""A block of Python, why it is not run if it is not, and what it prints if a block of text follows it."""

PAGES = sorted(path for path in (PROJECT / "docs").glob("*.md") if "```python" in path.read_text(encoding="utf-8"))


def test_the_code_of_the_readme_runs(tmp_path, monkeypatch):
    """As it stands, but for a search that is soon content and an audit of few prompts: `make demo` takes its time."""
    import sparse_interp as si

    monkeypatch.setattr(si, "PruneConfig", partial(si.PruneConfig, **LITTLE))
    monkeypatch.setattr(si, "audit", partial(si.audit, n_prompts=16, n_random=3))
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "readme"}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), names)


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory) -> Path:
    """A model that is called as the bundled one is, reads what it reads, and does nothing that it does, in no time."""
    import torch

    import sparse_interp as si
    from sparse_interp.model.checkpoint import bundled_tokenizer

    shape = {"n_layers": 2, "d_model": 16, "n_heads": 4, "d_head": 4, "d_mlp": 24, "n_ctx": 128, "d_vocab": 2048}
    named = {"model_name": "stdlib-small", "tokenizer_name": "python_2k", "bigram": False, "afrac": 0.5, "seed": 0}
    tokenizer = bundled_tokenizer("python_2k")
    model = si.HookedSparseTransformer(si.ModelConfig(**shape, **named, initializer_range=0.2), tokenizer).eval()
    drawn = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.startswith("blocks.") and weight.ndim > 1:
                weight *= torch.rand(weight.shape, generator=drawn) < 0.1  # few edges, so that each is soon tried
    text = torch.randint(2047, (32, 64), generator=drawn)
    folder = tmp_path_factory.mktemp("models") / "stdlib-small"
    card = {"name": "stdlib-small", "kind": "sparse", "validation": {"loss_nats": 7.6, "bigram_loss_nats": None}}
    return model.save(folder, bundled=True, card=card, validation=text, means=si.mean_activations(model, text))


ON_BUNDLED_MODELS = {"bridges"}
"""Pages whose code belongs to the bundled models and no others."""


@pytest.fixture
def in_no_time(request, stand_in, tmp_path, monkeypatch) -> Iterator[None]:
    """Searches, surveys and audits of next to nothing, on the stand-in, in a folder of their own."""
    import sparse_interp as si
    from sparse_interp.model import zoo

    def always(name: str, **fixed: Any) -> None:
        function: Callable[..., Any] = getattr(si, name)
        monkeypatch.setattr(si, name, lambda *args, **kwargs: function(*args, **kwargs | fixed))

    if request.node.callspec.params["page"].stem not in ON_BUNDLED_MODELS:
        monkeypatch.setattr(zoo, "_bundled", lambda: {"stdlib-small": stand_in})
    monkeypatch.setattr(si, "PruneConfig", partial(si.PruneConfig, **LITTLE))
    monkeypatch.setattr("sparse_interp.faithfulness.audit.add_tests", lambda *_: None)  # README's own audit has them
    always("find_circuit", progress=False)
    always("find_edges", progress=False)
    always("audit", level="quick", n_prompts=8, n_random=2, progress=False)
    always("adversarial_inputs", n_pairs=4)
    survey = si.score_tasks
    few = {"n_prompts": 2}
    monkeypatch.setattr(si, "score_tasks", lambda model, tasks=("for_while",), **k: survey(model, tasks, **few | k))
    always("search_circuits", n_trials=2, progress=False)
    always("rivals", n_seeds=2, n_pairs=8, progress=False)
    always("patch_nodes", sites=("neuron",), progress=False)
    always("attribute_nodes", sites=("neuron",), progress=False)
    monkeypatch.chdir(tmp_path)
    yield


@pytest.mark.filterwarnings("ignore:density 0.05 is too low")  # of the recipe `tiny`, and the page says so
@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_the_code_of_a_page_runs_from_top_to_bottom(page, in_no_time):
    names = {"__name__": page.stem}
    for block in CODE.finditer(page.read_text(encoding="utf-8")):
        if block["reason"]:
            continue
        printed = StringIO()
        with redirect_stdout(printed):
            exec(compile(block["code"], page.name, "exec"), names)
        if block["printed"] is not None:
            assert printed.getvalue() == block["printed"]


def test_a_block_of_a_page_that_is_not_run_says_why():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert len(CODE.findall(text)) == text.count("```python\n"), page.name
        assert text.count("<!-- not run:") == sum(bool(block["reason"]) for block in CODE.finditer(text)), page.name


# ---------------------------------------------------------------- commands, figures


def commands(start: str) -> list[tuple[str, str]]:
    """Page and command line, for each in README and docs that begins with `start`, in a block or between backticks."""
    pages = [PROJECT / "README.md", *(PROJECT / "docs").glob("*.md")]
    lines = [(page.name, page.read_text(encoding="utf-8")) for page in pages]
    return [
        (name, line) for name, text in lines for line in re.findall(rf"(?:^ *|`)({start} [^`\n]*)", text, re.MULTILINE)
    ]


def command_line() -> dict[str, set[str]]:
    """Command -> its options."""
    import typer

    from sparse_interp.cli import app

    group: Any = typer.main.get_command(app)
    always = {option for parameter in group.params for option in parameter.opts} | {"--help"}
    return {
        name: always | {o for parameter in command.params for o in (*parameter.opts, *parameter.secondary_opts)}
        for name, command in group.commands.items()
    }


def test_commands_in_documents_are_commands_with_the_options_that_they_are_given():
    known = command_line()
    for page, line in commands("sparse-interp"):
        words = shlex.split(line.split("#")[0])[1:]
        name = next((word for word in words if not word.startswith("-")), None)
        if name is not None and not name.isupper():
            assert name in known, f"{page}: {line}"
            strange = {word.split("=")[0] for word in words if word.startswith("--")} - known[name]
            assert not strange, f"{page}: {line}: {strange}"


def test_the_page_of_the_command_line_has_every_command():
    said = set(re.findall(r"^\| `sparse-interp (\w+)`", (PROJECT / "docs" / "running.md").read_text(), re.MULTILINE))
    assert said == set(command_line())


def test_benchmarks_in_documents_are_there_and_take_the_options_that_they_are_given():
    for page, line in commands("python"):
        script, *options = shlex.split(line.split("#")[0])[1:]
        if script.endswith(".py"):
            path = PROJECT / script
            assert path.is_file(), f"{page}: {line}"
            for option in (word for word in options if word.startswith("--")):
                assert f'"{option}"' in path.read_text(encoding="utf-8"), f"{page}: {line}: {option}"


def test_what_is_given_as_measured_in_scaling_is_what_the_results_say():
    text = (PROJECT / "docs" / "scaling.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| [^|]+ \| ([\d.]+) \| `([\w./-]+)`: `([\w.-]+)` \|$", text, flags=re.MULTILINE)
    assert len(rows) >= 20
    for figure, file, path in rows:
        found: Any = json.loads((PROJECT / (file if "/" in file else f"benchmarks/results/{file}")).read_text())
        for step in path.split("."):
            found = found[int(step)] if isinstance(found, list) else found[step]
        decimals = len(figure.partition(".")[2])
        assert round(found, decimals) == float(figure), f"{file}: {path} is {found}, and the page says {figure}"


def test_hooks_have_the_shapes_and_the_nodes_that_the_page_of_the_model_gives_them(plain_model, tokens):
    from sparse_interp.model.sites import SITES

    size = {"batch": 3, "pos": 7, "query": 7, "key": 7, "d_model": 12, "head": 3, "d_head": 5, "d_mlp": 20}
    _, cache = plain_model.run_with_cache(tokens)
    text = (PROJECT / "docs" / "model.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`[^|]*hook_[^|]*) \| ([^|]*) \|([^|]*)\|$", text, flags=re.MULTILINE)
    named = {}
    for hooks, shape, nodes in rows:
        first, *others = re.findall(r"`([^`]+)`", hooks)
        inside = first.rpartition(".")[0]
        names = [first, *(f"{inside}.{other}" if inside else other for other in others)]
        for name in names:
            expected = tuple(size[axis] if axis in size else {"d_vocab": 50, "1": 1}[axis] for axis in shape.split())
            assert tuple(cache.cache_dict[name.replace("L", "1")].shape) == expected, name
        named |= dict(zip(re.findall(r"`(\w+)`", nodes), names, strict=False))
    assert named == {site: SITES[site].hook.replace("{layer}", "L") for site in named} and len(named) == 9


# ---------------------------------------------------------------- all documents


def documents() -> list[Path]:
    pages = [path for ending in ("md", "py", "toml", "cff", "j2") for path in PROJECT.glob(f"*.{ending}")]
    for folder in ("sparse_interp", "data", "docs", "notebooks", "benchmarks", "tests"):
        pages += [path for ending in ("md", "py", "j2", "js", "sh") for path in (PROJECT / folder).rglob(f"*.{ending}")]
    return [*pages, PROJECT / "Makefile", PROJECT / ".ci" / "run"]


@pytest.mark.parametrize("page", documents(), ids=lambda path: path.relative_to(PROJECT).as_posix())
def test_no_page_names_a_place_on_somebodys_machine(page):
    lines = enumerate(page.read_text(encoding="utf-8").splitlines(), 1)
    found = [f"{page.name}:{i}: {line.strip()[:100]}" for i, line in lines if MACHINE_PATH.search(line)]
    assert not found, "\n".join(found)


def test_links_between_documents_lead_somewhere():
    for page in (path for path in documents() if path.suffix == ".md"):
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_version_is_the_same_everywhere():
    import sparse_interp

    assert f"version: {sparse_interp.__version__}\n" in (PROJECT / "CITATION.cff").read_text()
