// The page itself: reads the payload, keeps what the reader has chosen, and tells graph and panel of it.

/** Pixels between a vertex and its tooltip: far enough to leave the neighbours in the next columns in view. */
const TOOLTIP_DISTANCE = 190;

/** The payload with what drawing needs: lookups, sizes, and each edge's share of the strongest of its kind. */
function readModel() {
  const data = JSON.parse(document.getElementById("circuit-data").textContent);
  const vertices = [...data.nodes, ...data.tokens];
  const byId = new Map(vertices.map((vertex) => [vertex.id, vertex]));
  const edges = data.edges.map(([source, target, weight, kind], index) => ({ source, target, weight: weight ?? 0, kind, index, off: false }));
  const touching = new Map(vertices.map((vertex) => [vertex.id, []]));
  for (const edge of edges) {
    touching.get(edge.source).push(edge);
    touching.get(edge.target).push(edge);
  }
  measureEdges(edges);
  measureVertices(data);
  const incident = (id) => touching.get(id);
  return { data, vertices, edges, nodes: data.nodes, pieces: data.pieces, vertex: (id) => byId.get(id), incident,
    spoken: (vertex) => spokenName(vertex, incident(vertex.id)) };
}

function measureEdges(edges) {
  const strongest = {};
  for (const edge of edges) strongest[edge.kind] = Math.max(strongest[edge.kind] || 1e-9, Math.abs(edge.weight));
  for (const edge of edges) edge.share = Math.abs(edge.weight) / strongest[edge.kind];
}

/** Importance is size and darkness, relative to the most important node. */
function measureVertices({ nodes }) {
  const largest = Math.max(1e-9, ...nodes.map((node) => node.importance ?? 0));
  for (const node of nodes) {
    const share = node.importance === null ? 0.4 : Math.sqrt(clamp(node.importance / largest, 0, 1));
    Object.assign(node, { radius: 4.6 + 4.2 * share, fill: (0.06 + 0.94 * share).toFixed(3) });
  }
}

function spokenName(vertex, edges) {
  const inputs = edges.filter((edge) => edge.target === vertex.id && isWeight(edge)).length;
  const outputs = edges.filter((edge) => edge.source === vertex.id && isWeight(edge)).length;
  const importance = isToken(vertex) || vertex.importance === null ? "" : `, importance ${number(vertex.importance)}`;
  return `${fullName(vertex)}${importance}, ${plural(inputs, "input")}, ${plural(outputs, "output")}`;
}

function startPage() {
  const byId = (id) => document.getElementById(id);
  const model = readModel();
  const state = { hovered: null, focused: null, pinned: null };
  const graph = createGraph(byId("stage"), model, {
    hover: (vertex) => { state.hovered = vertex; refresh(); },
    focus: (vertex) => { state.focused = vertex; refresh(); },
    hoverEdge: (edge, event) => showTooltip(edge && edgeWords(edge), event && stagePoint(event)),
    pin: (vertex) => pin(state.pinned === vertex ? null : vertex),
  });

  function refresh() {
    const shown = state.hovered || state.focused || state.pinned;
    graph.highlight(shown ? shown.id : null);
    const pointed = state.hovered || state.focused;
    // The panel already says everything about the pinned one; a tooltip would only cover its neighbours.
    const told = pointed && pointed !== state.pinned;
    showTooltip(told && vertexWords(pointed), told && graph.screenPoint(pointed), TOOLTIP_DISTANCE);
  }

  function pin(vertex) {
    state.pinned = vertex;
    graph.markPinned(vertex ? vertex.id : null);
    document.body.classList.toggle("has-pin", vertex !== null);
    if (vertex) {
      showVertex(byId("detail"), model, vertex, follow, unpin);
      graph.reveal(vertex.id);
    } else showWelcome(byId("detail"), model, follow);
    refresh();
  }

  /** From a list: pin the other end, and bring it and the keyboard there together. */
  function follow(vertex) {
    pin(vertex);
    byId("detail").focus({ preventScroll: true });
  }

  function unpin() {
    const last = state.pinned;
    pin(null);
    if (last) graph.focus(last.id);
  }

  function vertexWords(vertex) {
    const weights = model.incident(vertex.id).filter(isWeight);
    const best = (end) => weights.filter((edge) => edge[end] === vertex.id).sort((a, b) => Math.abs(b.weight) - Math.abs(a.weight))[0];
    const line = (words, edge, end) => (edge ? `${words} ${fullName(model.vertex(edge[end]))} ${number(edge.weight, true)}` : null);
    return [model.spoken(vertex), line("strongest input:", best("target"), "source"), line("strongest output:", best("source"), "target")];
  }

  function edgeWords(edge) {
    const value = { residual: "identity along the residual stream", attention: "joined by the attention pattern" }[edge.kind];
    return [`${fullName(model.vertex(edge.source))} → ${fullName(model.vertex(edge.target))}`, value || `${model.data.edge_value} ${number(edge.weight, true)}`];
  }

  /** Beside `point`, at `distance` to the right of it or, where there is no room, to the left. */
  function showTooltip(lines, point, distance = 16) {
    const tooltip = byId("tooltip");
    tooltip.hidden = !lines;
    if (!lines) return;
    tooltip.replaceChildren(...lines.filter(Boolean).map((text) => el("p", {}, text)));
    const stage = byId("stage"), [x, y] = point;
    const { offsetWidth: width, offsetHeight: height } = tooltip;
    const left = x + distance + width < stage.clientWidth ? x + distance : x - distance - width;
    tooltip.style.left = `${clamp(left, 6, Math.max(6, stage.clientWidth - width - 6))}px`;
    tooltip.style.top = `${clamp(y - height / 2, HEADER_HEIGHT + 4, Math.max(HEADER_HEIGHT + 4, stage.clientHeight - height - 6))}px`;
  }

  function stagePoint(event) {
    const box = byId("stage").getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  }

  fillMasthead(model.data);
  showVerdict(byId("verdict"), byId("tab-audit"), model.data.audit, () => openTab("audit"));
  showAudit(byId("view-audit"), model.data.audit);
  fillLegend(byId("legend"), model.data.edge_value);
  wireTabs();
  wireTheme(byId("theme"));
  graph.draw();
  pin(null);
  wireEdgeControls(model, graph, refresh);
  wireSearch(model, graph, follow);
  byId("zoom-in").addEventListener("click", () => graph.zoomBy(1.4));
  byId("zoom-out").addEventListener("click", () => graph.zoomBy(1 / 1.4));
  byId("zoom-fit").addEventListener("click", () => graph.fit());
  document.addEventListener("keydown", (event) => { if (event.key === "Escape" && state.pinned) unpin(); });
  new ResizeObserver(() => { if (byId("stage").clientWidth) { graph.resized(); refresh(); } }).observe(byId("stage"));
}

function fillMasthead(data) {
  const write = (id, text) => { document.getElementById(id).textContent = text; };
  const layers = data.n_layers === null ? "" : plural(data.n_layers, "layer");
  write("eyebrow", [data.model, layers, data.task].filter(Boolean).join(" · ") || "sparse_interp");
  write("title", data.title);
  write("subtitle", data.subtitle);
  document.getElementById("summary").replaceChildren(...data.summary.map(([name, value]) =>
    el("div", {}, el("dt", {}, name), el("dd", {}, value))));
}

/** The legend is a picture of what the graph uses, drawn with the graph's own classes. */
function fillLegend(legend, value) {
  const wire = (kind, words) => {
    const sample = d3.select(el("span", { className: "sample" })), svg = sample.append("svg").attr("viewBox", "0 0 34 12");
    svg.append("path").attr("class", `edge ${kind}`).attr("d", "M1,6H31")
      .attr("marker-end", /positive|negative/.test(kind) ? `url(#end-${kind.split(" ")[1]})` : null);
    return el("span", {}, sample.node(), words);
  };
  const node = (site, words) => {
    const sample = d3.select(el("span", { className: "sample" })), svg = sample.append("svg").attr("viewBox", "-8 -7 16 14");
    svg.append("g").attr("class", `vertex node ${site}`).style("--importance", 0.55)
      .append("path").attr("class", "shape").attr("d", NODE_SHAPES[shapeOf({ site })](5));
    return el("span", {}, sample.node(), words);
  };
  legend.replaceChildren(wire("weight positive", `positive ${value}`), wire("weight negative", `negative ${value}`),
    wire("residual plain", "residual rail"), wire("attention plain", "attention"), node("attn_read", "read, q, k, v"),
    node("attn_write", "write"), node("neuron", "neuron"), el("span", { className: "aside" }, "larger, darker: more important"));
}

function openTab(name) {
  for (const other of ["circuit", "audit"]) {
    const tab = document.getElementById(`tab-${other}`), chosen = other === name;
    tab.setAttribute("aria-selected", String(chosen));
    tab.tabIndex = chosen ? 0 : -1;
    document.getElementById(`view-${other}`).hidden = !chosen;
    if (chosen) tab.focus();
  }
}

function wireTabs() {
  for (const [name, other] of [["circuit", "audit"], ["audit", "circuit"]]) {
    const tab = document.getElementById(`tab-${name}`);
    tab.addEventListener("click", () => openTab(name));
    tab.addEventListener("keydown", (event) => { if (/^Arrow(Left|Right)$/.test(event.key)) openTab(other); });
  }
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

/** The slider steps through the edges from weakest to strongest, so that every step changes the picture. */
function wireEdgeControls(model, graph, refresh) {
  const slider = document.getElementById("threshold"), output = document.getElementById("threshold-output");
  const shown = { residual: document.getElementById("show-residual"), attention: document.getElementById("show-attention") };
  const weights = model.edges.filter(isWeight);
  // A circuit's edges are the weights within its blocks; what tokens weigh is drawn beside them and counted apart.
  const counted = weights.filter((edge) => edge.kind === "weight"), entries = weights.filter((edge) => edge.kind !== "weight");
  const sizes = weights.map((edge) => Math.abs(edge.weight)).sort((a, b) => a - b);
  slider.max = String(Math.max(0, sizes.length - 1));
  slider.disabled = sizes.length < 2;
  slider.value = String(Math.max(0, sizes.length - DRAWN_AT_FIRST));
  if (model.edges.filter((edge) => edge.kind === "attention").length > DRAWN_AT_FIRST) shown.attention.checked = false;

  function apply() {
    const least = sizes.length ? sizes[Number(slider.value)] : 0;
    for (const edge of model.edges) edge.off = isWeight(edge) ? Math.abs(edge.weight) < least : !shown[edge.kind].checked;
    const everything = weights.every((edge) => !edge.off), words = countKept(counted, "edge");
    output.textContent = everything ? (weights.length ? `all ${plural(counted.length, "edge")} shown` : "no edges") : `|${model.data.edge_value === "weight" ? "w" : model.data.edge_value}| ≥ ${number(least)} · ${words}`;
    const tokens = entries.length ? `, ${countKept(entries, "token weight")}` : "";
    slider.setAttribute("aria-valuetext", `${words}${tokens} shown, ${model.data.edge_value} at least ${number(least)}`);
    graph.refreshEdges();
    refresh();
  }
  for (const control of [slider, ...Object.values(shown)]) control.addEventListener("input", apply);
  apply();
}

function countKept(edges, noun) {
  return `${edges.filter((edge) => !edge.off).length} of ${plural(edges.length, noun)}`;
}

/** Finds nodes by name, layer, head or channel, and by the tokens that they write. */
function wireSearch(model, graph, follow) {
  const field = document.getElementById("search"), list = document.getElementById("search-results");
  const count = document.getElementById("search-count");
  const texts = model.vertices.map((vertex) => [vertex,
    [fullName(vertex), vertex.id, isToken(vertex) ? vertex.piece : "", ...(vertex.writes || []).map(([token]) => token)].join("\n").toLowerCase()]);

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
