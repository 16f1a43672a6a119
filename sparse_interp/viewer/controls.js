// What a reader sets: the tab, the theme, which edges and nodes are drawn, and what is searched for.

/** Opens one tab and closes the others. `opened` is told its name. */
function wireTabs(opened) {
  const tabs = [...document.querySelectorAll("[role=tab]")].filter((tab) => !tab.hidden);
  const open = (chosen) => {
    for (const tab of tabs) {
      tab.setAttribute("aria-selected", String(tab === chosen));
      tab.tabIndex = tab === chosen ? 0 : -1;
      document.getElementById(tab.getAttribute("aria-controls")).hidden = tab !== chosen;
    }
    chosen.focus();
    opened(chosen.id.replace("tab-", ""));
  };
  tabs.forEach((tab, i) => {
    tab.addEventListener("click", () => open(tab));
    tab.addEventListener("keydown", (event) => {
      const to = { ArrowLeft: i - 1, ArrowRight: i + 1, Home: 0, End: tabs.length - 1 }[event.key];
      if (to === undefined) return;
      event.preventDefault();
      open(tabs[(to + tabs.length) % tabs.length]);
    });
  });
  return (name) => open(document.getElementById(`tab-${name}`));
}

/** Automatic follows the reader's system; the choice lives as long as the page (a sandboxed frame has no storage). */
function wireTheme(button) {
  const themes = ["automatic", "light", "dark"];
  let chosen = 0;
  const apply = () => {
    document.documentElement.dataset.theme = themes[chosen];
    button.textContent = `Theme: ${themes[chosen]}`;
  };
  button.addEventListener("click", () => { chosen = (chosen + 1) % themes.length; apply(); });
  apply();
}

/** Edges drawn before anyone moves the slider: a large circuit opens on its strongest ones. */
const DRAWN_AT_FIRST = 500;

/** Edges drawn at most, the strongest of them: beyond, a drawing is neither read nor moved. */
const DRAWN_AT_MOST = 4000;

/** The sliders step through edges and nodes from least to most, so that every step changes the picture. */
function wireThresholds(model, graph, refresh) {
  const [edgeSlider, edgeOutput] = ["threshold", "threshold-output"].map((id) => document.getElementById(id));
  const [nodeSlider, nodeOutput] = ["least", "least-output"].map((id) => document.getElementById(id));
  const shown = { residual: document.getElementById("show-residual"), attention: document.getElementById("show-attention") };
  const weights = model.edges.filter(isWeight).sort((a, b) => Math.abs(a.weight) - Math.abs(b.weight));
  // A circuit's edges are the weights within its blocks; what tokens weigh is drawn beside them and counted apart.
  const counted = weights.filter((edge) => edge.kind === "weight"), entries = weights.filter((edge) => edge.kind !== "weight");
  const first = Math.max(0, weights.length - DRAWN_AT_MOST);
  const needs = model.nodes.map((node) => node.importance).filter((need) => need !== null).sort((a, b) => a - b);
  Object.assign(edgeSlider, { min: String(first), max: String(Math.max(first, weights.length - 1)), disabled: weights.length < 2 });
  edgeSlider.value = String(Math.max(first, weights.length - DRAWN_AT_FIRST));
  Object.assign(nodeSlider, { max: String(Math.max(0, needs.length - 1)), disabled: needs.length < 2, value: "0" });
  if (model.edges.filter((edge) => edge.kind === "attention").length > DRAWN_AT_FIRST) shown.attention.checked = false;

  function apply() {
    const rank = Number(edgeSlider.value), least = weights.length ? Math.abs(weights[rank].weight) : 0;
    const need = Number(nodeSlider.value) > 0 ? needs[Number(nodeSlider.value)] : -Infinity;
    for (const vertex of model.vertices) vertex.off = !isToken(vertex) && (vertex.importance ?? Infinity) < need;
    for (const edge of model.edges) edge.off = !isWeight(edge) && !shown[edge.kind].checked;
    weights.forEach((edge, i) => { edge.off = Math.abs(edge.weight) < least || i < first; });
    for (const edge of model.edges) edge.off ||= model.vertex(edge.source).off || model.vertex(edge.target).off;
    const words = countKept(counted, "edge"), value = model.data.edge_value === "weight" ? "w" : model.data.edge_value;
    edgeOutput.textContent = weights.length === 0 ? "no edges" : weights.every((edge) => !edge.off) ? `all ${plural(counted.length, "edge")} shown` : `|${value}| ≥ ${number(least)} · ${words}`;
    const tokens = entries.length ? `, ${countKept(entries, "token weight")}` : "";
    edgeSlider.setAttribute("aria-valuetext", `${words}${tokens} shown, ${model.data.edge_value} at least ${number(least)}`);
    const nodes = countKept(model.nodes, "node");
    nodeOutput.textContent = needs.length === 0 ? "not measured" : need === -Infinity ? `all ${plural(model.nodes.length, "node")} shown` : `≥ ${number(need)} · ${nodes}`;
    nodeSlider.setAttribute("aria-valuetext", `${nodes} shown${need === -Infinity ? "" : `, importance at least ${number(need)}`}`);
    graph.refreshEdges();
    refresh();
  }
  for (const control of [edgeSlider, nodeSlider, ...Object.values(shown)]) control.addEventListener("input", apply);
  apply();
}

function countKept(things, noun) {
  return `${things.filter((thing) => !thing.off).length} of ${plural(things.length, noun)}`;
}

/** Finds nodes by name, layer, head or channel, and by the tokens that they write. */
function wireSearch(model, graph, follow) {
  const field = document.getElementById("search"), list = document.getElementById("search-results");
  const count = document.getElementById("search-count");
  const texts = model.vertices.map((vertex) => [vertex,
    [fullName(vertex), vertex.id, isToken(vertex) ? vertex.piece : "", ...(vertex.writes || []).map(([token]) => model.text(token))].join("\n").toLowerCase()]);

  function matches() {
    const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
    return words.length ? texts.filter(([, text]) => words.every((word) => text.includes(word))).map(([vertex]) => vertex) : null;
  }

  function apply() {
    const found = matches();
    graph.markMatches(found && new Set(found.map((vertex) => vertex.id)));
    count.textContent = found ? `${plural(found.length, "match")}`.replace("matchs", "matches") : "";
    list.hidden = !found;
    list.replaceChildren(...(found || []).slice(0, 10).map((vertex) => el("li", {},
      el("button", { type: "button", onclick: () => choose(vertex) }, fullName(vertex)))),
      ...(found && found.length > 10 ? [el("li", { className: "none" }, `and ${found.length - 10} more`)] : []),
      ...(found && found.length === 0 ? [el("li", { className: "none" }, "nothing matches")] : []));
  }

  function choose(vertex) {
    field.value = "";
    apply();
    follow(vertex);
  }

  field.addEventListener("input", apply);
  field.addEventListener("keydown", (event) => {
    const found = matches();
    if (event.key === "Enter" && found && found.length) choose(found[0]);
    if (event.key === "ArrowDown" && !list.hidden) list.querySelector("button")?.focus();
    if (event.key === "Escape") { field.value = ""; apply(); event.stopPropagation(); }
  });
  list.addEventListener("keydown", (event) => {
    if (!/^Arrow(Up|Down)$/.test(event.key)) return;
    const buttons = [...list.querySelectorAll("button")], at = buttons.indexOf(document.activeElement);
    (buttons[at + (event.key === "ArrowDown" ? 1 : -1)] || field).focus();
    event.preventDefault();
  });
}
