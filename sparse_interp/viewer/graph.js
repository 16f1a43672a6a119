// The drawing: rails and blocks behind, wires above them, nodes on top, and headings that stay in view while the graph
// moves under them. Sign is told three times: by colour, by dashes, and by the wire's end (arrow against bar).

const NODE_SHAPES = { circle: (r) => `M${-r},0A${r},${r} 0 1 1 ${r},0A${r},${r} 0 1 1 ${-r},0Z`, square: squarePath, hexagon: hexagonPath };
const HEADER_HEIGHT = 46;
/** Pixels of a node's name: a letter's width, the height, and the way from the node. */
const NAME = { letter: 6.8, height: 11, away: 2, apart: 2 };
/** Pixels between nodes from which those without a drawn wire are named too. */
const ROOMY = 21;

function squarePath(r) {
  const a = r * 0.9, c = r * 0.3;
  return `M${-a + c},${-a}H${a - c}Q${a},${-a} ${a},${-a + c}V${a - c}Q${a},${a} ${a - c},${a}H${-a + c}Q${-a},${a} ${-a},${a - c}V${-a + c}Q${-a},${-a} ${-a + c},${-a}Z`;
}

function hexagonPath(r) {
  const s = r * 1.1, h = s * 0.87;
  return `M${-s},0L${-s / 2},${-h}H${s / 2}L${s},0L${s / 2},${h}H${-s / 2}Z`;
}

function shapeOf(vertex) {
  if (vertex.site === "neuron") return "hexagon";
  return /_write$/.test(vertex.site) ? "square" : "circle";
}

/** Draws `model` into the stage and keeps it in step with the reader. `on` is told of hover, focus and pinning. */
function createGraph(stage, model, on, name = "main") {
  const svg = d3.select(stage).append("svg").attr("class", "graph").attr("role", "group")
    .attr("aria-label", `The circuit ${model.data.title}, from token embeddings on the left to the output on the right`)
    .attr("aria-describedby", "graph-help");
  addMarkers(svg.append("defs"), name);
  const world = svg.append("g").attr("class", "world");
  const layers = Object.fromEntries(["blocks", "rails", "heads", "edges", "hot-edges", "headNames", "nodes", "railNames"].map(
    (part) => [part, world.append("g").attr("class", part)]));
  const heading = svg.append("g").attr("class", "heading").attr("aria-hidden", "true");
  const state = { layout: null, transform: d3.zoomIdentity, roving: null, moved: false, shown: null, sized: null,
    pinned: null, matches: null, out: new Set(), shared: new Set() };

  const zoom = d3.zoom().scaleExtent([0.12, 8]).filter(wantsZoom).on("zoom", (event) => {
    state.transform = event.transform;
    state.moved = state.moved || event.sourceEvent !== null;
    applyTransform();
  }).on("end", fitSizes);
  svg.call(zoom).on("dblclick.zoom", null);

  function draw() {
    const { width, height } = size();
    state.layout = layoutCircuit(model.vertices, model.edges, width, height - HEADER_HEIGHT);
    drawBlocks(layers.blocks, state.layout);
    drawRails(layers.rails, layers.railNames, state.layout);
    drawHeads(layers.heads, layers.headNames, state.layout);
    drawNodes(layers.nodes, model, on, { moveFrom, focused: (vertex) => { setRoving(vertex.id); reveal(vertex); } });
    setRoving(state.roving || startVertex(model).id);
    markPinned(state.pinned);
    markMatches(state.matches);
    markShared(state.shared);
    markOut(state.out);
    state.sized = null;
    svg.selectAll("marker").attr("markerWidth", clamp(state.layout.pitch * 0.5, 5.5, 8)).attr("markerHeight", clamp(state.layout.pitch * 0.5, 5.5, 8));
    svg.style("--rail", clamp(state.layout.railGap * 0.3, 0.6, 1.7));
    fit(false);
    applyTransform();
    fitSizes();
  }

  function size() {
    return { width: Math.max(320, stage.clientWidth), height: Math.max(240, stage.clientHeight) };
  }

  /** The whole graph, as large as it goes without blowing up a small one. */
  function fit(animated = true) {
    const { width, height } = size(), layout = state.layout;
    const room = height - HEADER_HEIGHT;
    const k = Math.min(width / layout.width, room / layout.height, 1.15);
    const x = (width - layout.width * k) / 2;
    const y = HEADER_HEIGHT + (room - layout.height * k) / 2;
    moving(animated).call(zoom.transform, d3.zoomIdentity.translate(x, y).scale(k));
    state.moved = false;
  }

  function moving(animated) {
    const still = !animated || matchMedia("(prefers-reduced-motion: reduce)").matches;
    return still ? svg : svg.transition().duration(260);
  }

  /** While the graph moves, one attribute moves it, and the headings follow. */
  function applyTransform() {
    const { x, k } = state.transform;
    world.attr("transform", state.transform);
    const start = state.layout.rails.length ? state.layout.rails[0].start : 0;
    layers.railNames.attr("transform", `translate(${Math.max(start, (6 - x) / k)},0)`);
    drawHeading(heading, state.layout, state.transform, size().width);
  }

  /** Sizes that do not grow with the graph are set once it stands still: they touch every element. */
  function fitSizes() {
    const { k } = state.transform;
    if (k === state.sized) return;
    state.sized = k;
    svg.style("--k", k);
    nameNodes();
    svg.classed("far", k < 0.6);
    svg.classed("rails-named", state.layout.railGap * k >= 12.5);
  }

  function nameNodes() {
    const named = namesWithRoom(model, state.layout, state.transform.k);
    layers.nodes.selectAll("g.node").classed("named", (vertex) => named.has(vertex.id));
  }

  function setRoving(id) {
    const at = (one) => layers.nodes.selectAll("g.vertex").filter((vertex) => vertex.id === one);
    if (state.roving !== null) at(state.roving).attr("tabindex", -1);
    state.roving = id;
    at(id).attr("tabindex", 0);
  }

  /** Pans just enough that the focused vertex is in view. */
  function reveal(vertex) {
    const { width, height } = size();
    const [x, y] = state.transform.apply([vertex.x, vertex.y]);
    const dx = clamp(x, 60, width - 60) - x, dy = clamp(y, HEADER_HEIGHT + 24, height - 40) - y;
    if (dx || dy) svg.call(zoom.translateBy, dx / state.transform.k, dy / state.transform.k);
  }

  function moveFrom(vertex, key) {
    const next = neighbourInDirection(state.layout.columns, vertex, key);
    if (next) focus(next.id);
  }

  function focus(id) {
    const node = layers.nodes.selectAll("g.vertex").filter((vertex) => vertex.id === id).node();
    if (node) node.focus({ preventScroll: true });
  }

  /** Light up one vertex (or none) and what it is joined to; everything else steps back. */
  function highlight(id) {
    if (id === state.shown) return;
    state.shown = id;
    const joined = id === null ? [] : model.incident(id).filter(isDrawn);
    const near = new Set(joined.flatMap((edge) => [edge.source, edge.target]));
    if (id !== null) near.add(id);
    svg.classed("has-focus", id !== null && !state.out.has(id));
    layers.nodes.selectAll("g.vertex.hot").classed("hot", false).classed("centre", false);
    if (id !== null) layers.nodes.selectAll("g.vertex").filter((vertex) => near.has(vertex.id)).classed("hot", true).classed("centre", (vertex) => vertex.id === id);
    drawEdges(layers["hot-edges"], model, joined, state.layout, name);
    const channels = new Set([...near].map((one) => model.vertex(one)).filter(onRail).map((v) => v.channel));
    layers.railNames.selectAll("text").classed("hot", (rail) => channels.has(rail.channel));
    layers.rails.selectAll("line").classed("hot", (rail) => channels.has(rail.channel));
  }

  /** An edge that the reader asked to see, between nodes that are both there. */
  function isDrawn(edge) {
    return !edge.off && !state.out.has(edge.source) && !state.out.has(edge.target);
  }

  function markPinned(id) {
    state.pinned = id;
    layers.nodes.selectAll("g.vertex").classed("pinned", (vertex) => vertex.id === id)
      .attr("aria-pressed", (vertex) => String(vertex.id === id));
  }

  function markMatches(ids) {
    state.matches = ids;
    svg.classed("searching", ids !== null);
    layers.nodes.selectAll("g.vertex").classed("match", (vertex) => ids !== null && ids.has(vertex.id));
  }

  /** Cross out what is knocked out, and take its wires away. */
  function markOut(ids) {
    state.out = ids;
    layers.nodes.selectAll("path.cross").remove();
    layers.nodes.selectAll("g.vertex").classed("out", (vertex) => ids.has(vertex.id)).filter((vertex) => ids.has(vertex.id))
      .append("path").attr("class", "cross").attr("d", ({ radius: r }) => `M${-r - 4},${-r - 4}L${r + 4},${r + 4}M${-r - 4},${r + 4}L${r + 4},${-r - 4}`);
    refreshEdges();
  }

  /** A ring around nodes that another circuit has too. */
  function markShared(ids) {
    state.shared = ids;
    layers.nodes.selectAll("g.vertex").classed("shared", (vertex) => ids.has(vertex.id));
  }

  /** Draw what the reader asked to see; a vertex that keeps no wire fades. */
  function refreshEdges() {
    if (!state.layout) return;
    const drawn = model.edges.filter(isDrawn);
    drawEdges(layers.edges, model, withoutCovered(drawn, model), state.layout, name);
    const joined = new Set(drawn.flatMap((edge) => [edge.source, edge.target]));
    for (const vertex of model.vertices) vertex.idle = !joined.has(vertex.id);
    layers.nodes.selectAll("g.vertex").classed("idle", (vertex) => vertex.idle).classed("off", (vertex) => Boolean(vertex.off));
    nameNodes();
    const shown = state.shown;
    state.shown = undefined;
    highlight(shown ?? null);
  }

  layers.edges.on("pointerover", (event) => on.hoverEdge(d3.select(event.target).datum(), event)).on("pointerout", () => on.hoverEdge(null));

  return { draw, fit, focus, highlight, markPinned, markMatches, markOut, markShared, refreshEdges,
    reveal: (id) => reveal(model.vertex(id)),
    zoomBy: (factor) => moving(true).call(zoom.scaleBy, factor),
    screenPoint: (vertex) => state.transform.apply([vertex.x, vertex.y]),
    resized: () => { if (state.layout && !state.moved) draw(); } };
}

/** Identities along a rail lie on each other: of those that leave one write, the one that goes furthest covers the rest. */
function withoutCovered(edges, model) {
  const furthest = new Map();
  for (const edge of edges) {
    if (edge.kind !== "residual") continue;
    const best = furthest.get(edge.source);
    if (!best || model.vertex(edge.target).x > model.vertex(best.target).x) furthest.set(edge.source, edge);
  }
  return edges.filter((edge) => edge.kind !== "residual" || furthest.get(edge.source) === edge);
}

/** Ids of nodes whose name finds room at scale `k`, the most important first: on no other name, and on no other node. */
function namesWithRoom(model, layout, k) {
  const cells = new Map(), named = new Set(), size = 24;
  const near = (box, visit) => {
    for (let i = Math.floor(box[0] / size); i <= box[2] / size; i++) for (let j = Math.floor(box[1] / size); j <= box[3] / size; j++) visit(i * 65536 + j);
  };
  const put = (box) => near(box, (cell) => { if (cells.has(cell)) cells.get(cell).push(box); else cells.set(cell, [box]); });
  const meets = (a) => {
    let found = false;
    near(a, (cell) => { found ||= (cells.get(cell) || []).some((b) => a[0] < b[2] && b[0] < a[2] && a[1] < b[3] && b[1] < a[3]); });
    return found;
  };
  const nodes = model.nodes.filter((vertex) => !vertex.off);
  for (const { x, width, top } of layout.heads) put([x * k, top * k, (x + width) * k, (top + CARD.title) * k]);
  for (const { x, y, radius: r } of nodes) put([(x - r) * k, (y - r) * k, (x + r) * k, (y + r) * k]);
  const candidates = nodes.filter((vertex) => !vertex.idle || layout.pitch * k >= ROOMY);
  candidates.sort((a, b) => (b.importance ?? 0) - (a.importance ?? 0)).forEach((vertex) => {
    const half = NAME.letter * shortName(vertex).length / 2 + NAME.apart, bottom = (vertex.y - vertex.radius) * k - NAME.away;
    const box = [vertex.x * k - half, bottom - NAME.height, vertex.x * k + half, bottom];
    if (meets(box)) return;
    named.add(vertex.id);
    put(box);
  });
  return named;
}

/** Inside another page a plain wheel belongs to that page's scrolling; there, zooming takes Ctrl or ⌘. */
function wantsZoom(event) {
  if (event.type === "wheel") return event.ctrlKey || event.metaKey || window.self === window.top;
  return !event.button && !event.target.closest(".vertex");
}

/** Where the keyboard enters the graph: the most important node, or the first. */
function startVertex(model) {
  const nodes = model.nodes.length ? model.nodes : model.vertices;
  return nodes.reduce((best, node) => ((node.importance || 0) > (best.importance || 0) ? node : best), nodes[0]);
}

/** Up and down within the column, left and right to the nearest of the next column: every vertex can be reached. */
function neighbourInDirection(columns, vertex, key) {
  const there = columns.map((column) => column.vertices.filter((other) => !other.off || other === vertex)).filter((list) => list.length);
  const at = there.findIndex((list) => list.includes(vertex)), rank = there[at].indexOf(vertex);
  if (key === "ArrowUp" || key === "ArrowDown") return there[at][rank + (key === "ArrowUp" ? -1 : 1)];
  if (key === "Home") return there[0][0];
  if (key === "End") return there.at(-1).at(-1);
  const next = there[at + (key === "ArrowLeft" ? -1 : 1)];
  return next && next.reduce((best, other) => (Math.abs(other.y - vertex.y) < Math.abs(best.y - vertex.y) ? other : best));
}

function addMarkers(defs, name) {
  const shapes = { positive: "M0,0.8L7.5,4L0,7.2Z", negative: "M4.6,0H7V8H4.6Z" };
  for (const [sign, d] of Object.entries(shapes)) {
    defs.append("marker").attr("id", `end-${sign}-${name}`).attr("class", `end ${sign}`).attr("viewBox", "0 0 8 8")
      .attr("refX", 6.5).attr("refY", 4)
      .attr("markerUnits", "userSpaceOnUse").attr("orient", "auto").append("path").attr("d", d);
  }
}

function drawBlocks(group, layout) {
  group.selectAll("rect").data(layout.blocks).join("rect").attr("class", (block) => `block ${block.kind}`)
    .attr("x", (b) => b.x).attr("y", (b) => b.y).attr("width", (b) => b.width).attr("height", (b) => b.height).attr("rx", 14);
}

function drawRails(group, names, layout) {
  group.selectAll("line").data(layout.rails, (rail) => rail.channel).join("line")
    .attr("x1", (r) => r.start).attr("x2", (r) => r.end).attr("y1", (r) => r.y).attr("y2", (r) => r.y);
  names.selectAll("text").data(layout.rails, (rail) => rail.channel).join("text")
    .attr("y", (r) => r.y).text((r) => r.channel);
}

/** A card behind the wires of each head, and its name in front of them. */
function drawHeads(group, names, layout) {
  const key = (card) => `${card.layer}.${card.head}`;
  group.selectAll("rect").data(layout.heads, key).join("rect").attr("rx", 8)
    .attr("x", (c) => c.x).attr("y", (c) => c.top).attr("width", (c) => c.width).attr("height", (c) => c.height);
  names.selectAll("text").data(layout.heads, key).join("text").attr("x", (c) => c.x + c.width / 2).attr("y", (c) => c.top + 12)
    .text((c) => (c.head === null ? "" : `head ${c.head}`));
}

function isWeight(edge) {
  return edge.kind !== "residual" && edge.kind !== "attention";
}

/** Strong wires are drawn last, so that weak ones never cover them. */
function drawEdges(group, model, edges, layout, name) {
  const start = layout && layout.rails.length ? layout.rails[0].start : 0;
  const drawn = [...edges].sort((a, b) => isWeight(a) - isWeight(b) || a.share - b.share);
  group.selectAll("path").data(drawn, (edge) => edge.index).join("path")
    .attr("class", (edge) => `edge ${edge.kind} ${isWeight(edge) ? signOf(edge) : "plain"}`)
    .attr("d", (edge) => edgePath(edge, model, start))
    .attr("stroke-width", (edge) => (isWeight(edge) ? 0.8 + 3.4 * edge.share : null))
    .attr("stroke-opacity", (edge) => (isWeight(edge) ? 0.5 + 0.45 * edge.share : null))
    .attr("marker-end", (edge) => (isWeight(edge) ? `url(#end-${signOf(edge)}-${name})` : null))
    .order();
}

function signOf(edge) {
  return edge.weight < 0 ? "negative" : "positive";
}

function edgePath(edge, model, railStart) {
  const a = model.vertex(edge.source), b = model.vertex(edge.target);
  const x1 = a.x + reach(a), x2 = b.x - reach(b) - 2;
  if (edge.kind === "residual") return `M${x1},${a.y}H${x2}`;
  if (edge.kind === "embedding" && onRail(b)) return `${curve(x1, a.y, railStart, b.y)}H${x2}`;
  return curve(x1, a.y, x2, b.y);
}

function curve(x1, y1, x2, y2) {
  const bend = Math.max(14, (x2 - x1) * 0.48);
  return `M${x1},${y1}C${x1 + bend},${y1} ${x2 - bend},${y2} ${x2},${y2}`;
}

/** How far a vertex extends to the side that its wires leave and enter. */
function reach(vertex) {
  return isToken(vertex) ? vertex.halfWidth : vertex.radius;
}

function drawNodes(group, model, on, keyboard) {
  const joined = group.selectAll("g.vertex").data(model.vertices, (vertex) => vertex.id).join((enter) => {
    const vertex = enter.append("g").attr("role", "button").attr("aria-pressed", "false").attr("tabindex", -1)
      .attr("data-id", (v) => v.id);
    vertex.append("path").attr("class", "halo");
    vertex.append("path").attr("class", "shape");
    vertex.append("text").attr("class", "name");
    return vertex;
  });
  joined.attr("class", (v) => `vertex ${isToken(v) ? `token ${v.role}` : `node ${v.site}`}`)
    .attr("transform", (v) => `translate(${v.x},${v.y})`).attr("aria-label", (v) => model.spoken(v))
    .style("--importance", (v) => v.fill);
  joined.select(".halo").attr("d", (v) => outline(v, isToken(v) ? 5 : clamp(v.radius * 0.7, 2.5, 5)));
  joined.select(".shape").attr("d", (v) => outline(v, 0));
  joined.select(".name").attr("y", (v) => (isToken(v) ? 4 * v.scale : -v.radius - NAME.away))
    .style("font-size", (v) => (isToken(v) ? `${12 * v.scale}px` : null)).text(shortName);
  joined.on("pointerenter", (event, v) => on.hover(v)).on("pointerleave", () => on.hover(null))
    .on("focus", (event, v) => { keyboard.focused(v); on.focus(v); }).on("blur", () => on.focus(null))
    .on("click", (event, v) => { event.currentTarget.focus({ preventScroll: true }); on.pin(v); })
    .on("keydown", (event, v) => pressed(event, v, on, keyboard));
}

function pressed(event, vertex, on, keyboard) {
  if (event.key === "Enter" || event.key === " ") on.pin(vertex);
  else if (/^(Arrow|Home$|End$)/.test(event.key)) keyboard.moveFrom(vertex, event.key);
  else return;
  event.preventDefault();
}

function outline(vertex, extra) {
  if (!isToken(vertex)) return NODE_SHAPES[shapeOf(vertex)](vertex.radius + extra);
  const w = vertex.halfWidth + extra, h = 11 * vertex.scale + extra, r = 6 + extra / 2;
  return `M${-w + r},${-h}H${w - r}A${r},${r} 0 0 1 ${w},${-h + r}V${h - r}A${r},${r} 0 0 1 ${w - r},${h}H${-w + r}A${r},${r} 0 0 1 ${-w},${h - r}V${-h + r}A${r},${r} 0 0 1 ${-w + r},${-h}Z`;
}

/** Layer and column names over the graph: they follow sideways and zoom, never up and down. */
function drawHeading(group, layout, { x, k }, width) {
  const across = (value) => x + k * value;
  const named = blockNames(layout.blocks, k), columns = columnNames(layout.columns, k);
  group.selectAll("rect").data([0]).join("rect").attr("class", "strip").attr("width", width).attr("height", HEADER_HEIGHT);
  group.selectAll("text.block-name").data(named).join("text").attr("class", "block-name")
    .attr("x", ({ block }) => across(middle(block))).attr("y", 18)
    .text(({ name }) => name);
  group.selectAll("line").data(layout.blocks).join("line").attr("class", (b) => `bracket ${b.kind}`)
    .attr("x1", (b) => across(b.x)).attr("x2", (b) => across(b.x + b.width)).attr("y1", 25).attr("y2", 25);
  group.selectAll("text.column-name").data(layout.columns).join("text").attr("class", "column-name")
    .attr("x", (c) => across(c.x)).attr("y", (c) => (c.layer === null ? 28 : 40))
    .text((c, i) => columns[i]);
}

/** Names of columns that leave room to both neighbours: no name is wider than the way to the next. Columns of blocks are
 * all named in one style, the longest that fits everywhere; in the shortest, a name without room is left out. */
function columnNames(columns, k) {
  const apart = (i, j) => (columns[j] ? Math.abs(columns[i].x - columns[j].x) * k : Infinity);
  const fits = (name, i) => name.length * COLUMN_LETTER <= Math.min(apart(i, i - 1), apart(i, i + 1)) - 5;
  const spelt = (column, style) => COLUMN_STYLES.slice(0, style + 1).findLast((names) => names[column.site])[column.site];
  const styles = [...COLUMN_STYLES.keys()];
  const inBlocks = styles.find((style) => columns.every((column, i) => column.layer === null || fits(spelt(column, style), i))) ?? styles.at(-1);
  return columns.map((column, i) => {
    const names = (column.layer === null ? styles : [inBlocks]).map((style) => spelt(column, style));
    return names.find((name) => fits(name, i)) || "";
  });
}

/** Pixels that a letter of a column's name takes at most, on average over a word. */
const COLUMN_LETTER = 6.6;

const BLOCK_NAMES = [
  (block) => `Layer ${block.layer} · ${block.kind}`,
  (block) => `L${block.layer} ${block.kind === "attention" ? "attn" : "MLP"}`,
  (block) => `L${block.layer} ${block.kind === "attention" ? "A" : "M"}`,
];

/** The longest style in which no name touches the next, one for all: two spellings side by side would look like two
 * meanings. In the shortest, a name that would touch the one before it is left out until there is room. */
function blockNames(blocks, k) {
  const touches = (style) => (a, b) => (middle(b) - middle(a)) * k < 8.2 * (style(a).length + style(b).length) / 2;
  const fits = (style) => blocks.every((block, i) => i === 0 || !touches(style)(blocks[i - 1], block));
  const style = BLOCK_NAMES.find(fits) || BLOCK_NAMES.at(-1);
  const shown = [];
  for (const block of blocks) if (!shown.length || !touches(style)(shown.at(-1), block)) shown.push(block);
  return shown.map((block) => ({ block, name: style(block) }));
}

function middle(block) {
  return block.x + block.width / 2;
}
