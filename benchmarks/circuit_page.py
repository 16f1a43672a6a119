"""The circuit page: its weight, when it is first drawn, and what moving in it costs, at 60, 300 and 1,000 nodes.

    python benchmarks/circuit_page.py [--pages FOLDER] [--repeats 3] [--out benchmarks/results]

Circuits are the nodes of a bundled model with the most weight on their wires, so that there is more to draw than a
search would leave; every page has prompts, contexts, knock-outs and readings. The last row is of the dense twin, where
nearly every two neighbours are joined. Medians over openings in a headless Chromium without a GPU.

    first_draw_ms       wall time from the beginning of navigation to the second frame after the graph stands
    first_draw_cpu_ms   processor time of the page's main thread until then: script, style, layout, paint
    STEP_cpu_ms         the same for one step, frame included, mean of 12: pointing at another node, pinning one, moving
                        the graph, zooming, a step of the threshold
    STEP_ms             wall time of script, style and layout of such a step, median of 12

Wall time is stretched by whatever else the machine does, processor time hardly. A frame at 60 Hz has 16.7 ms.
`console` and `requests` count what the page wrote to the console (complaints of its policy among it) and asked for.

`--pages` keeps the pages, and measures those that are there already.
"""

import argparse
import importlib.util
import json
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from abs_topk import machine

import sparse_interp as si
from sparse_interp.circuit.knock_outs import knock_outs
from sparse_interp.circuit.readings import read_heads
from sparse_interp.circuit.showing import page
from sparse_interp.model.sites import NODE_SITES, wires
from sparse_interp.model.zoo import validation_blocks

CASES = (("stdlib-small", 60), ("stdlib-small", 100), ("stdlib-small", 300), ("stdlib-small", 1000),
         ("stdlib-small-dense", 1000))  # fmt: skip

TASK = "single_double_quote"

N_BLOCKS, N_PAIRS = 32, 8
"""Text and prompts that a page is described on: fewer make no smaller page, but are sooner done."""

MARK_DRAWN = """new MutationObserver(() => requestAnimationFrame(() => requestAnimationFrame(() => {
  window.drawnAt = performance.now(); }))).observe(document, {subtree: true, attributes: true,
  attributeFilter: ["data-ready"]})"""

STEPS = 12
"""How often each kind of step is made."""

STEP = """async (act) => {
  const times = [];
  for (let i = 0; i < STEPS; i++) {
    const began = performance.now();
    act(i, STEPS);
    document.querySelector("#stage svg").getBoundingClientRect();
    times.push(performance.now() - began);
    await new Promise((done) => requestAnimationFrame(done));
  }
  return times.sort((a, b) => a - b);
}""".replace("STEPS", str(STEPS))

ACTS = {
    "point": """(i) => { const all = document.querySelectorAll("#stage g.node"), node = all[(i * 37) % all.length];
      node.dispatchEvent(new PointerEvent("pointerenter")); }""",
    "pin": """(i) => { const all = document.querySelectorAll("#stage g.node"), node = all[(i * 37) % all.length];
      node.dispatchEvent(new MouseEvent("click", {bubbles: true})); }""",
    "move": """(i, n) => { const stage = document.querySelector("#stage svg"), at = {bubbles: true, view: window};
      if (i === 0) stage.dispatchEvent(new MouseEvent("mousedown", {...at, clientX: 500, clientY: 500}));
      window.dispatchEvent(new MouseEvent("mousemove", {...at, clientX: 500 + 5 * i, clientY: 500 + 3 * i}));
      if (i === n - 1) window.dispatchEvent(new MouseEvent("mouseup", at)); }""",
    "zoom": """(i, n) => document.querySelector("#stage svg").dispatchEvent(new WheelEvent("wheel",
      {bubbles: true, cancelable: true, deltaY: i < n / 2 ? -40 : 40, clientX: 500, clientY: 500}))""",
    "threshold": """(i) => { const slider = document.querySelector("#threshold");
      slider.value = String(Number(slider.max) - 10 * (i + 1)); slider.dispatchEvent(new Event("input")); }""",
}


def heaviest(model: si.HookedSparseTransformer, n: int) -> si.Circuit:
    """The `n` nodes with the most weight on their wires; final reads have that of the write before them."""
    total: dict[si.Node, float] = {}
    for layer, block in enumerate(model.layers):
        for wire in wires(model.cfg):
            weight = wire.weight(block).detach().abs()
            for site, sums in ((wire.source.name, weight.sum(1)), (wire.target.name, weight.sum(0))):
                for channel, size in enumerate(sums.tolist()):
                    node = si.Node(layer, site, channel)
                    total[node] = total.get(node, 0.0) + size
    last = model.cfg.n_layers - 1
    total |= {
        si.Node(last + 1, "final_read", c): total[si.Node(last, "mlp_write", c)] for c in range(model.cfg.d_model)
    }
    assert {node.site for node in total} == set(NODE_SITES)
    chosen = sorted(total, key=lambda node: (-total[node], node))[:n]
    known = {"importance": {node: total[node] for node in chosen}, "task_name": TASK}
    return si.Circuit.of_nodes(model, chosen, si.baseline_means(model.cfg.model_name), **known)


def write_page(path: Path, name: str, n: int) -> None:
    """The whole page of such a circuit."""
    model = si.load(name)
    circuit = heaviest(model, n)
    batch = si.task(TASK, model.tokenizer).batch(N_PAIRS, generator=torch.Generator().manual_seed(0))
    known = si.describe(circuit, model, validation_blocks(name)[:N_BLOCKS], batch)
    given = {"readings": read_heads(circuit, model, batch), "knocked": knock_outs(circuit, model, batch, progress=True)}
    circuit.to_html(path, page(circuit, model, batch, known, **given))


def open_browser(profile: str) -> Any:
    """The headless Chromium that the tests use."""
    binary = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None)
    if binary is None:
        sys.exit("There is no Chromium here; on Debian and Ubuntu `apt-get install chromium` brings it.")
    spec = importlib.util.spec_from_file_location("browser", Path(__file__).parents[1] / "tests" / "browser.py")
    module = sys.modules["browser"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Browser(binary, profile)


def main_thread_ms(tab: Any) -> float:
    """Processor time that the page's main thread has used, tasks of every kind."""
    metrics = {one["name"]: one["value"] for one in tab.call("Performance.getMetrics")["metrics"]}
    return 1000 * metrics["TaskDuration"]


def measure(browser: Any, path: Path, repeats: int) -> dict[str, Any]:
    """Openings of one page, and steps in the last of them."""
    drawn, spent, row = [], [], {"kilobytes": path.stat().st_size / 1000}
    for _ in range(repeats):
        tab = browser.tab()
        tab.call("Performance.enable", timeDomain="threadTicks")
        tab.call("Page.addScriptToEvaluateOnNewDocument", source=MARK_DRAWN)
        before = main_thread_ms(tab)
        tab.open_circuit(path)
        drawn.append(tab.js("new Promise((done) => setTimeout(() => done(window.drawnAt), 100))"))
        spent.append(main_thread_ms(tab) - before)
        if len(drawn) == repeats:
            count = "(s) => document.querySelectorAll('#stage ' + s).length"
            counts = tab.js(f"['g.node', '.edges .edge', '*'].map({count})")
            row |= dict(zip(("nodes", "edges_drawn", "elements"), counts, strict=True))
            row |= {"first_draw_ms": statistics.median(drawn), "first_draw_cpu_ms": statistics.median(spent)}
            row |= measure_steps(tab)
        row["console"] = row.get("console", 0) + len(tab.complaints())
        row["requests"] = row.get("requests", 0) + len(tab.requests())
        browser.close_tabs()
    return row


def measure_steps(tab: Any) -> dict[str, float]:
    """What each kind of step costs."""
    row = {}
    for name, act in ACTS.items():
        before = main_thread_ms(tab)
        times = tab.js(f"({STEP})({act})")
        row[f"{name}_cpu_ms"] = (main_thread_ms(tab) - before) / STEPS
        row[f"{name}_ms"] = statistics.median(times)
    return row


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--pages", type=Path)
    options.add_argument("--repeats", type=int, default=3)
    options.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    given = options.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        pages = given.pages or Path(scratch) / "pages"
        pages.mkdir(parents=True, exist_ok=True)
        for name, n in CASES:
            if not (path := pages / f"{name}-{n}.html").exists():
                write_page(path, name, n)
        browser = open_browser(str(Path(scratch) / "profile"))
        given.out.mkdir(parents=True, exist_ok=True)
        found = {"machine": machine(), "repeats": given.repeats, "rows": []}
        for name, n in CASES:
            row = {"model": name} | measure(browser, (pages / f"{name}-{n}.html").absolute(), given.repeats)
            found["rows"].append(row)
            (given.out / "circuit_page.json").write_text(json.dumps(found, indent=1) + "\n")
            print("  ".join(f"{key} {value:,.1f}" if isinstance(value, float) else f"{key} {value}"
                            for key, value in row.items()))  # fmt: skip
        browser.close()


if __name__ == "__main__":
    main()
