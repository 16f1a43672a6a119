// Where everything stands. Columns follow the forward pass from left to right; a residual channel is a rail, one
// height for the whole width, so that a channel keeps its place from layer to layer. What remains to be chosen is the
// order of the rails and the height of everything that is not on one; both follow their neighbours.

const BLOCK_SITES = ["attn_read", "q", "k", "v", "attn_write", "mlp_read", "neuron", "mlp_write"];
/** What columns are called, in full and shorter; a style names what it shortens. */
const COLUMN_STYLES = [
  { attn_read: "read", q: "q", k: "k", v: "v", attn_write: "write", mlp_read: "read", neuron: "neurons",
    mlp_write: "write", final_read: "final read", embedding: "tokens in", unembedding: "tokens out" },
  { neuron: "neur.", final_read: "final", embedding: "in", unembedding: "out" },
  { attn_read: "r", attn_write: "w", mlp_read: "r", mlp_write: "w", neuron: "n", final_read: "f" },
];
/** Widths of columns, in units of an ordinary one: q, k and v of a head stand close together. */
const COLUMN_WIDTHS = { q: 0.5, k: 0.5, v: 0.62, embedding: 1.15, unembedding: 1.25 };
const MARGIN = { top: 26, right: 26, bottom: 30, left: 18 };
const HEAD_TITLE = 24;
const HEAD_GAP = 12;
/** Room before the first block in which rails begin and carry their channel numbers. */
const RAIL_GUTTER = 38;

function clamp(value, low, high) {
  return Math.max(low, Math.min(high, value));
}

/** The columns that hold something, in the order of the forward pass. */
function columnsOf(vertices) {
  const groups = new Map();
  for (const vertex of vertices) {
    const key = isToken(vertex) ? vertex.side : vertex.site === "final_read" ? "final_read" : `${vertex.layer}.${vertex.site}`;
    if (!groups.has(key)) groups.set(key, []);
    groups.get(key).push(vertex);
  }
  const layers = [...new Set(vertices.filter((v) => !isToken(v) && v.site !== "final_read").map((v) => v.layer))];
  const order = ["embedding"];
  for (const layer of layers.sort((a, b) => a - b)) order.push(...BLOCK_SITES.map((site) => `${layer}.${site}`));
  order.push("final_read", "unembedding");
  return order.filter((key) => groups.has(key)).map((key) => {
    const [layer, site] = key.includes(".") ? key.split(".") : [null, key];
    return { key, site, layer: layer === null ? null : Number(layer), vertices: groups.get(key) };
  });
}

/** id -> [{other, weight}] for every edge that says something about closeness. */
function neighbourTable(vertices, edges) {
  const table = new Map(vertices.map((vertex) => [vertex.id, []]));
  for (const edge of edges) {
    if (edge.kind === "residual") continue;
    const pull = Math.abs(edge.weight) + 1e-6;
    table.get(edge.source).push({ other: edge.target, pull });
    table.get(edge.target).push({ other: edge.source, pull });
  }
  return table;
}

/** The mean of the neighbours' places, weighted by |weight|; `fallback` where there is no neighbour. */
function pulledTo(ids, neighbours, place, fallback) {
  let total = 0, sum = 0;
  for (const id of ids) {
    for (const { other, pull } of neighbours.get(id)) {
      if (!place.has(other)) continue;
      total += pull;
      sum += pull * place.get(other);
    }
  }
  return total > 0 ? sum / total : fallback;
}

/** Rails in an order that keeps joined things near: barycentres, a few rounds, ties by channel number. */
function orderRails(vertices, neighbours) {
  const rails = new Map();
  for (const vertex of vertices.filter((v) => !isToken(v) && onRail(v))) {
    if (!rails.has(vertex.channel)) rails.set(vertex.channel, []);
    rails.get(vertex.channel).push(vertex.id);
  }
  let order = [...rails.keys()].sort((a, b) => a - b);
  const place = new Map();
  const settle = () => order.forEach((channel, rank) => {
    for (const id of rails.get(channel)) place.set(id, (rank + 0.5) / order.length);
  });
  settle();
  const inside = vertices.filter((v) => isToken(v) || !onRail(v));
  for (let round = 0; round < 12; round++) {
    const next = inside.map((vertex) => [vertex.id, pulledTo([vertex.id], neighbours, place, 0.5)]);
    for (const [id, y] of next) place.set(id, y);
    const pulled = new Map(order.map((channel, rank) =>
      [channel, pulledTo(rails.get(channel), neighbours, place, (rank + 0.5) / order.length)]));
    order.sort((a, b) => pulled.get(a) - pulled.get(b) || a - b);
    settle();
  }
  return order;
}

/**
 * Places for items that want to be at `want` and need `size` each, in [low, high], moved as little as possible
 * (least squares; pool adjacent violators). Sets `item.y` to each item's centre.
 */
function spread(items, low, high) {
  items.sort((a, b) => a.want - b.want || (a.key < b.key ? -1 : 1));
  const pools = [];
  let offset = 0;
  for (const item of items) {
    item.offset = offset + item.size / 2;
    offset += item.size;
    pools.push({ sum: item.want - item.offset, items: [item] });
    while (pools.length > 1 && mean(pools.at(-2)) > mean(pools.at(-1))) {
      const last = pools.pop();
      pools.at(-1).sum += last.sum;
      pools.at(-1).items.push(...last.items);
    }
  }
  const start = (low + high - offset) / 2;
  for (const pool of pools) {
    const shift = offset > high - low ? start : clamp(mean(pool), low, high - offset);
    for (const item of pool.items) item.y = shift + item.offset;
  }
  function mean(pool) { return pool.sum / pool.items.length; }
}

/** Widths of the columns in pixels, wide enough to breathe and no wider. */
function placeColumns(columns, width) {
  const units = columns.map((column) => COLUMN_WIDTHS[column.site] || 1);
  const total = units.reduce((sum, unit) => sum + unit, 0);
  const fixed = MARGIN.left + MARGIN.right + RAIL_GUTTER;
  const unit = clamp((width - fixed) / total, 54, 132);
  enlargeTokens(columns, clamp((total * unit + fixed) / width, 1, 1.7));
  let x = MARGIN.left;
  columns.forEach((column, index) => {
    if (index === (columns[0].site === "embedding" ? 1 : 0)) x += RAIL_GUTTER;
    column.width = Math.max(unit * units[index], 16 + 2 * Math.max(0, ...column.vertices.map((v) => v.halfWidth || 0)));
    column.x = x + column.width / 2;
    x += column.width;
  });
  return { unit, width: x + MARGIN.right };
}

/** Tokens are read as text: where the graph will be shown smaller, they are drawn larger. */
function enlargeTokens(columns, scale) {
  for (const token of columns.flatMap((column) => column.vertices).filter(isToken)) {
    token.scale = scale;
    token.halfWidth = scale * (9 + 3.8 * Array.from(shortName(token)).length);
  }
}

/** The distance between rails, and the height of the graph: roomy when there is room, never below what fits a node. */
function chooseHeight(columns, nRails, height) {
  const room = height - MARGIN.top - MARGIN.bottom;
  const railGap = clamp(room / Math.max(1, nRails), 15, 84);
  const nodeGap = clamp(railGap, 15, 30);
  let inside = 0;
  for (const column of columns) {
    const heads = new Set(column.vertices.filter((v) => v.head !== null && v.head !== undefined).map((v) => v.head)).size;
    const fewest = column.site === "neuron" ? 15 : nodeGap;
    inside = Math.max(inside, column.vertices.length * fewest + heads * (HEAD_TITLE + HEAD_GAP));
  }
  const span = Math.max(nRails * railGap, inside, Math.min(room, 220));
  return { railGap: nRails ? span / nRails : railGap, nodeGap, span };
}

/** One card per attention head, with its q, k and v in three short columns. Sets their heights, returns the cards. */
function placeHeads(columns, layer, neighbours, place, box, nodeGap) {
  const parts = columns.filter((column) => column.layer === layer && ["q", "k", "v"].includes(column.site));
  if (parts.length === 0) return [];
  const heads = new Map();
  for (const column of parts) {
    for (const vertex of column.vertices) {
      const key = vertex.head ?? -1;
      if (!heads.has(key)) heads.set(key, { head: vertex.head, layer, columns: new Map(), ids: [] });
      const card = heads.get(key);
      if (!card.columns.has(column)) card.columns.set(column, []);
      card.columns.get(column).push(vertex);
      card.ids.push(vertex.id);
    }
  }
  const cards = [...heads.values()].map((card) => {
    const tallest = Math.max(...[...card.columns.values()].map((list) => list.length));
    const inner = tallest * nodeGap + HEAD_TITLE;
    return { ...card, key: String(card.head).padStart(4, "0"), inner, size: inner + HEAD_GAP,
      want: pulledTo(card.ids, neighbours, place, (box.low + box.high) / 2) };
  });
  spread(cards, box.low, box.high);
  const left = parts[0].x - parts[0].width / 2, right = parts.at(-1).x + parts.at(-1).width / 2;
  for (const card of cards) {
    Object.assign(card, { x: left + 3, width: right - left - 6, top: card.y - card.inner / 2, height: card.inner });
    for (const list of card.columns.values()) placeInCard(list, card, neighbours, place, nodeGap);
  }
  return cards;
}

function placeInCard(vertices, card, neighbours, place, nodeGap) {
  const middle = card.top + HEAD_TITLE + (card.inner - HEAD_TITLE) / 2;
  const items = vertices.map((vertex) => ({
    vertex, key: vertex.id, size: nodeGap, want: pulledTo([vertex.id], neighbours, place, middle),
  }));
  spread(items, card.top + HEAD_TITLE, card.top + card.inner);
  for (const item of items) place.set(item.vertex.id, item.y);
}

/** Heights for a column that is neither on rails nor in heads: neurons and tokens. */
function placeFree(column, neighbours, place, box, gap) {
  const middle = (box.low + box.high) / 2;
  const items = column.vertices.map((vertex) => ({
    vertex, key: vertex.id, size: gap, want: pulledTo([vertex.id], neighbours, place, middle),
  }));
  spread(items, box.low, box.high);
  for (const item of items) place.set(item.vertex.id, item.y);
}

/** Rounded areas behind a layer's attention and MLP, with the columns that they cover. */
function blocksOf(columns, span) {
  const blocks = [];
  for (const column of columns) {
    if (column.layer === null) continue;
    const kind = ["mlp_read", "neuron", "mlp_write"].includes(column.site) ? "MLP" : "attention";
    const last = blocks.at(-1);
    if (last && last.layer === column.layer && last.kind === kind) last.columns.push(column);
    else blocks.push({ layer: column.layer, kind, columns: [column] });
  }
  return blocks.map((block) => {
    const first = block.columns[0], end = block.columns.at(-1);
    const x = first.x - first.width / 2 + 7;
    return { ...block, x, width: end.x + end.width / 2 - 7 - x, y: MARGIN.top - 14, height: span + 28 };
  });
}

/** The whole layout for a drawing area of `width` by `height` pixels. */
function layoutCircuit(vertices, edges, width, height) {
  const columns = columnsOf(vertices);
  const neighbours = neighbourTable(vertices, edges);
  const channels = orderRails(vertices, neighbours);
  const { unit, width: fullWidth } = placeColumns(columns, width);
  // A graph wider than the drawing area is shown smaller, which leaves it that much more height to use.
  const shrink = Math.min(1, width / fullWidth);
  const { railGap, nodeGap, span } = chooseHeight(columns, channels.length, height / shrink);
  const box = { low: MARGIN.top, high: MARGIN.top + span };
  const railY = new Map(channels.map((channel, rank) => [channel, box.low + (rank + 0.5) * railGap]));

  const place = new Map();
  for (const vertex of vertices) if (!isToken(vertex) && onRail(vertex)) place.set(vertex.id, railY.get(vertex.channel));
  const heads = [...new Set(columns.map((column) => column.layer))].filter((layer) => layer !== null)
    .flatMap((layer) => placeHeads(columns, layer, neighbours, place, box, nodeGap));
  for (const column of columns) {
    if (column.site === "neuron") placeFree(column, neighbours, place, box, Math.min(34, span / column.vertices.length));
    if (column.layer === null && column.site !== "final_read") {
      placeFree(column, neighbours, place, box, Math.min(30 * (column.vertices[0].scale || 1), span / column.vertices.length));
    }
  }
  for (const column of columns) {
    for (const vertex of column.vertices) Object.assign(vertex, { x: column.x, y: place.get(vertex.id), column });
    column.vertices.sort((a, b) => a.y - b.y);
    staggerCrowd(column, span, unit);
  }
  return { columns, heads, blocks: blocksOf(columns, span), railGap, nodeGap, width: fullWidth,
    height: MARGIN.top + span + MARGIN.bottom, rails: railsOf(columns, channels, railY) };
}

/** Neurons closer than a node is tall alternate between two half-columns. */
function staggerCrowd(column, span, unit) {
  if (column.site !== "neuron" || span / column.vertices.length > 17) return;
  column.vertices.forEach((vertex, index) => { vertex.x += (index % 2 ? 1 : -1) * unit * 0.14; });
}

/** One rail per channel, from just before the first block to the last column that is on rails. */
function railsOf(columns, channels, railY) {
  const carrying = columns.filter((column) => column.layer !== null || column.site === "final_read");
  if (carrying.length === 0) return [];
  const first = carrying[0], last = carrying.at(-1);
  const start = first.x - first.width / 2 - RAIL_GUTTER, end = last.x;
  return channels.map((channel) => ({ channel, y: railY.get(channel), start, end }));
}
