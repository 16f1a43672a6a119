// The page itself: reads the payload, keeps what the reader has chosen, and tells graph and panel of it.

/** Pixels between a vertex and its tooltip: far enough to leave the neighbours in the next columns in view. */
const TOOLTIP_DISTANCE = 190;

/** Unpacks the payload, which is compressed JSON, and shows it; says so where a viewer is too old for that. */
async function openPage() {
  try {
    const packed = Uint8Array.from(atob(document.getElementById("circuit-data").textContent), (letter) => letter.charCodeAt(0));
    const text = await new Response(new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"))).text();
    startPage(JSON.parse(text), text);
    document.documentElement.dataset.ready = "yes";
  } catch (error) {
    document.getElementById("title").textContent = `This page could not be drawn: ${error}`;
    throw error;
  }
}

/** `text` is what `data` was read from, for whoever wants to take it away. */
function startPage(data, text) {
  const byId = (id) => document.getElementById(id);
  const model = readModel(data, data.pieces);
  const state = { hovered: null, focused: null, pinned: null, out: null };
  const graph = createGraph(byId("stage"), model, {
    hover: (vertex) => { state.hovered = vertex; refresh(); },
    focus: (vertex) => { state.focused = vertex; refresh(); },
    hoverEdge: (edge, event) => showTooltip(edge && edgeWords(edge), event && stagePoint(event)),
    pin: (vertex) => pin(state.pinned === vertex ? null : vertex),
  });
  const acts = {
    follow, close: unpin, openHead: (head) => openOther(head, showHead), openHalf: (half) => openOther(half, showHalf),
    isOut: (out) => state.out !== null && state.out.name === out.name, knock,
  };

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
      showVertex(byId("detail"), model, vertex, acts);
      graph.reveal(vertex.id);
    } else showWelcome(byId("detail"), model, acts);
    refresh();
  }

  /** A head or half block in the panel; the graph shows all of it. */
  function openOther(what, show) {
    pin(null);
    document.body.classList.add("has-pin");
    show(byId("detail"), model, what, { ...acts, close: () => pin(null) });
    byId("detail").focus({ preventScroll: true });
  }

  /** From a list: pin the other end, and bring it and the keyboard there together. */
  function follow(vertex) {
    if (byId("view-circuit").hidden) openTab("circuit");
    pin(vertex);
    byId("detail").focus({ preventScroll: true });
  }

  function unpin() {
    const last = state.pinned;
    pin(null);
    if (last) graph.focus(last.id);
  }

  /** Knock something out, or put it back; one thing at a time, as it was measured. Returns whether it is out now. */
  function knock(out) {
    state.out = acts.isOut(out) ? null : out;
    graph.markOut(state.out ? state.out.ids : new Set());
    showOut(byId("out"), model.data.whole, state.out, () => { knock(state.out); if (state.pinned) pin(state.pinned); else pin(null); });
    refresh();
    return state.out !== null;
  }

  function vertexWords(vertex) {
    const weights = model.incident(vertex.id).filter(isWeight);
    const best = (end) => weights.filter((edge) => edge[end] === vertex.id).sort((a, b) => Math.abs(b.weight) - Math.abs(a.weight))[0];
    const line = (words, edge, end) => (edge ? `${words} ${fullName(model.vertex(edge[end]))} ${number(edge.weight, true)}` : null);
    const without = vertex.knock_out && data.whole && vertex.knock_out.lead !== null ? `without it the lead is ${number(vertex.knock_out.lead)} logits, not ${number(data.whole.lead)}` : null;
    return [model.spoken(vertex), without, line("strongest input:", best("target"), "source"), line("strongest output:", best("source"), "target")];
  }

  function edgeWords(edge) {
    const value = { residual: "identity along the residual stream", attention: "joined by the attention pattern" }[edge.kind];
    return [`${fullName(model.vertex(edge.source))} → ${fullName(model.vertex(edge.target))}`, value || `${data.edge_value} ${number(edge.weight, true)}`];
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

  fillMasthead(data);
  const hide = (name, there) => { byId(`tab-${name}`).hidden = !there; };
  hide("compare", data.other);
  hide("channels", data.channels.length);
  hide("origin", data.tables.length + data.curves.length);
  // Made when they are first opened: a reader of the graph need not wait for them.
  const unmade = new Map(Object.entries({
    audit: (view) => showAudit(view, data.audit), channels: (view) => showChannels(view, model, follow), origin: (view) => showOrigin(view, data),
    compare: (view) => showCompare(view, data, { follow: (id) => follow(model.vertex(id)) }),
  }));
  const openTab = wireTabs((name) => {
    unmade.get(name)?.(byId(`view-${name}`));
    unmade.delete(name);
  });
  showVerdict(byId("verdict"), byId("tab-audit"), data.audit, () => openTab("audit"));
  fillLegend(byId("legend"), data.edge_value);
  wireTheme(byId("theme"));
  wireThresholds(model, graph, () => {});
  graph.draw();
  pin(null);
  wireSearch(model, graph, follow);
  wireExports(byId("export"), model, byId("stage"), text);
  byId("zoom-in").addEventListener("click", () => graph.zoomBy(1.4));
  byId("zoom-out").addEventListener("click", () => graph.zoomBy(1 / 1.4));
  byId("zoom-fit").addEventListener("click", () => graph.fit());
  document.addEventListener("keydown", (event) => { if (event.key === "Escape" && document.body.classList.contains("has-pin")) unpin(); });
  new ResizeObserver(() => { if (byId("stage").clientWidth) { graph.resized(); refresh(); } }).observe(byId("stage"));
}

/** The strip that says what is out and what that does, as long as it is. */
function showOut(strip, whole, out, putBack) {
  strip.hidden = out === null;
  if (out === null) return strip.replaceChildren();
  const changes = OUTCOME_ROWS.filter(([, key]) => out.outcome[key] !== null && whole[key] !== null)
    .map(([name, key]) => `${name.split(",")[0]} ${number(whole[key])} → ${number(out.outcome[key])}`);
  return strip.replaceChildren(el("strong", {}, `Without ${out.name}: `), el("span", {}, changes.join(" · ")),
    el("button", { type: "button", className: "quiet small", onclick: putBack }, "Put it back"));
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
      .attr("marker-end", /positive|negative/.test(kind) ? `url(#end-${kind.split(" ")[1]}-main)` : null);
    return el("span", {}, sample.node(), words);
  };
  const node = (site, words) => {
    const sample = d3.select(el("span", { className: "sample" })), svg = sample.append("svg").attr("viewBox", "-8 -7 16 14");
    svg.append("g").attr("class", `vertex node ${site}`).style("--importance", 0.55)
      .append("path").attr("class", "shape").attr("d", NODE_SHAPES[shapeOf({ site })](5));
    return el("span", {}, sample.node(), words);
  };
  legend.replaceChildren(wire("weight positive", `positive ${value}`), wire("weight negative", `negative ${value}`),
    node("attn_read", "read, q, k, v"), node("attn_write", "write"), node("neuron", "neuron"),
    el("span", { className: "aside" }, "larger, darker: more important"));
  for (const kind of ["residual", "attention"]) document.querySelector(`#show-${kind} + .sample`).replaceChildren(...wire(`${kind} plain`, "").querySelectorAll("svg"));
}

