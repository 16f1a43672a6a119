"""The documentation builds without a warning, leads nowhere that is not there, and names every public name."""

import ast
import inspect
import re
import subprocess
import sys
from functools import cache
from html import unescape
from os.path import normpath
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest

import sparse_interp as si

PROJECT = Path(__file__).parents[1]
DOCS = PROJECT / "docs"
HOSTS = {"arxiv.org", "d3js.org", "github.com", "www.sphinx-doc.org", "pradyunsg.me"}
"""Where links may lead that are not checked, for want of a network; `make docs-links` asks each."""
MADE_BY_SPHINX = {"genindex.html", "py-modindex.html", "search.html", "_modules/index.html"}


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The built site; made once."""
    pytest.importorskip("myst_nb", reason="no Sphinx, so the site was not built (pip install 'sparse_interp[docs]')")
    folder = tmp_path_factory.mktemp("docs") / "site"
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", str(DOCS), str(folder)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    return folder


@cache
def addresses(page: Path) -> tuple[list[str], list[str], set[str]]:
    """Where a page leads, what it loads, and what in it can be led to."""
    text = re.sub(r"<script\b[^>]*>.*?</script>", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    links = [unescape(href) for href in re.findall(r'<a\b[^>]*?\shref="([^"]*)"', text)]
    loads = [unescape(src) for src in re.findall(r'<(?:img|link|script|iframe)\b[^>]*?\s(?:src|href)="([^"]*)"', text)]
    return links, loads, {unescape(name) for name in re.findall(r'\sid="([^"]*)"', text)}


def pages(site: Path) -> list[Path]:
    return sorted(path for path in site.rglob("*.html") if "_static" not in path.parts)


def test_every_link_of_the_site_leads_somewhere(site):
    dead = []
    for page in pages(site):
        for link in addresses(page)[0]:
            if "://" in link:
                assert re.match(r"https://([\w.-]+)(/|$)", link), f"{page.name} links to {link}"
                if link.split("/")[2] not in HOSTS:
                    dead.append(f"{page.name}: {link}, whose host is not in HOSTS")
                continue
            path, fragment = urldefrag(link)
            target = (page.parent / unquote(path)).resolve() if path else page
            if not target.is_file() or (
                fragment and target.suffix == ".html" and unquote(fragment) not in addresses(target)[2]
            ):
                dead.append(f"{page.relative_to(site)}: {link}")
    assert not dead, "\n".join(dead)


def test_the_site_loads_nothing_from_elsewhere(site):
    for page in pages(site):
        remote = [load for load in addresses(page)[1] if re.match(r"(https?:)?//", load)]
        assert not remote, f"{page.name} loads {remote}"


def test_every_page_is_reached_from_the_first(site):
    seen, ahead = set(), {"index.html"}
    while ahead:
        page = ahead.pop()
        seen.add(page)
        paths = {unquote(urldefrag(link)[0]) for link in addresses(site / page)[0] if "://" not in link}
        targets = {normpath(Path(page).parent / path) for path in paths if path.endswith(".html")}
        ahead |= {target for target in targets if (site / target).is_file()} - seen
    assert not {page.relative_to(site).as_posix() for page in pages(site)} - MADE_BY_SPHINX - seen


def test_no_page_shows_an_address_in_memory_or_a_place_on_somebodys_machine(site):
    for page in pages(site):
        text = page.read_text(encoding="utf-8")
        assert not re.search(r" at 0x[0-9a-f]{6}", text), page.name
        assert str(PROJECT) not in text, page.name


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_asks_for_nothing_outside_and_has_no_complaint(site, browser, scheme):
    tab = browser.tab(scheme)
    for page in ("index.html", "api/circuit.html", "audits.html"):
        tab.open(site / page)
        lightness = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).every((c) => c > 127)"
        assert tab.js(lightness) == (scheme == "light")
        assert tab.js("document.documentElement.scrollWidth <= innerWidth"), f"{page} is wider than its window"
    assert not tab.complaints()
    assert not [address for address in tab.requests() if not address.startswith("file:")]
    browser.close_tabs()


# ---------------------------------------------------------------- every public name


def public_names() -> list[str]:
    """In the order of the index page, sparse_interp/__init__.py."""
    tree = ast.parse((PROJECT / "sparse_interp" / "__init__.py").read_text())
    return [alias.asname for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names]


def entries() -> list[str]:
    """Names that pages below docs/api have an entry for, in the order of their table of contents."""
    (listed,) = re.findall(r"```{toctree}\n(.*?)```", (DOCS / "api" / "index.md").read_text(), flags=re.DOTALL)
    found = []
    for page in listed.split():
        text = (DOCS / "api" / f"{page}.md").read_text()
        found += re.findall(r"^\.\. auto(?:class|exception|function):: (\w+)$", text, flags=re.MULTILINE)
    return found


def test_the_reference_has_every_public_name_and_no_other():
    missing, gone = set(public_names()) - set(entries()), set(entries()) - set(public_names())
    assert not missing, f"docs/api has no entry for {sorted(missing)}"
    assert not gone, f"docs/api has an entry for {sorted(gone)}"
    assert len(entries()) == len(set(entries()))


def test_the_reference_keeps_the_reading_order_within_each_floor():
    order = public_names()
    for page in (DOCS / "api").glob("*.md"):
        text = page.read_text()
        places = [order.index(name) for name in re.findall(r"^\.\. auto\w+:: (\w+)$", text, flags=re.MULTILINE)]
        assert places == sorted(places), page.name


@pytest.mark.parametrize("name", public_names())
def test_a_public_name_says_what_it_is(name):
    text = getattr(si, name).__doc__ or ""  # its own, not one that a class inherits
    assert text.strip().split("\n\n")[0].endswith((".", ":"))


@pytest.mark.parametrize("name", public_names())
def test_a_docstring_that_lists_arguments_lists_all_of_them_in_order(name):
    thing = getattr(si, name)
    text = inspect.getdoc(thing) or ""
    listed = re.search(r"^Args:\n((?:    .*\n?)+)", text, flags=re.MULTILINE)
    if listed is None:
        return
    named = re.findall(r"^    (\w+): ", listed[1], flags=re.MULTILINE)
    takes = list(inspect.signature(thing).parameters)
    assert sorted(named) == sorted(takes)
