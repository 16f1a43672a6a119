"""The documents are true: README's code runs, its map names what is there, and no page knows whose machine it is on."""

import re
from functools import partial
from pathlib import Path

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


def test_the_code_of_the_readme_runs(tmp_path, monkeypatch):
    """As it stands, but for a search that is soon content and an audit of few prompts: `make demo` takes its time."""
    import sparse_interp as si

    little = {"n_steps": 10, "batch_size": 4, "n_train": 32, "n_selection": 16, "max_kl": 1.9, "max_loss_gap": 4.0}
    monkeypatch.setattr(si, "PruneConfig", partial(si.PruneConfig, **little))
    monkeypatch.setattr(si, "audit", partial(si.audit, n_prompts=16, n_random=3))
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "readme"}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), names)


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
