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
/** A gap between columns that is wider than this says nothing more. */
const GAP_MOST = 170;
/** From the columns of a block to its edge. */
const BLOCK_PAD = 10;

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

/** Left edges of all parts: what is left over of the width goes between them. Returns the width of everything. */
function placeParts(parts, { sizes, needed, width }) {
  const spare = Math.max(0, width - needed), shares = parts.reduce((sum, { gap }) => sum + gap.share, 0);
  let x = MARGIN.left;
  parts.forEach((part, i) => {
    x += Math.min(GAP_MOST, part.gap.least + spare * part.gap.share / (shares || 1));
    Object.assign(part, sizes[i], { x });
    x += part.across;
  });
  return x + MARGIN.right;
}

/** Reads and writes: each on its rail, in a lane that has room there. */
function placeOnRails({ vertices, x }, railY, pitch) {
  const sorted = [...vertices].sort((a, b) => railY.get(a.channel) - railY.get(b.channel));
  const lanes = firstFit(sorted.map(({ channel }) => railY.get(channel)), pitch);
  sorted.forEach((vertex, i) => Object.assign(vertex, { x: x + (lanes[i] + 0.5) * pitch, y: railY.get(vertex.channel) }));
}

/** Neurons and tokens: as near to their neighbours' heights as there is room, from lane to lane. */
function placeFree({ vertices, x, lanes, across }, neighbours, place, box, most) {
  const items = vertices.map((vertex) => ({
    vertex, key: vertex.id, size: Math.min(most, (box.high - box.low) / vertices.length),
    want: pulledTo([vertex.id], neighbours, place, (box.low + box.high) / 2),
  }));
  spread(items, box.low, box.high);
  items.forEach(({ vertex, y }, i) => {
    Object.assign(vertex, { y, x: x + (i % lanes + 0.5) * across / lanes });
    place.set(vertex.id, y);
  });
}

/** One card per head, stacked beside each other where one stack is too high. Places q, k and v, returns the cards. */
function placeHeads(part, neighbours, place, box, pitch) {
  const cards = part.cards.map((card) => ({ ...card, size: cardHeight(card, part.rows, pitch),
    want: pulledTo(card.ids, neighbours, place, (box.low + box.high) / 2) }));
  cards.sort((a, b) => a.want - b.want || (a.key < b.key ? -1 : 1));
  const { where } = stacked(cards.map(({ size }) => size), part.stacks);
  cards.forEach((card, i) => { card.stack = where[i]; });
  for (let stack = 0; stack < part.stacks; stack++) spread(cards.filter((card) => card.stack === stack), box.low, box.high);
  for (const card of cards) {
    const height = card.size - CARD.gap;
    Object.assign(card, { x: part.x + card.stack * (part.cardWidth + CARD.gap), width: part.cardWidth, top: card.y - height / 2, height });
    placeInCard(part.sites, card, neighbours, place, pitch);
  }
  part.placed = cards;
  return cards;
}

function placeInCard(sites, card, neighbours, place, pitch) {
  const pull = (row) => pulledTo(row.map(({ id }) => id), neighbours, place, card.y);
  const ordered = (rows) => [...rows.values()].map((row) => [pull(row), row])
    .sort((a, b) => a[0] - b[0] || a[1][0].channel - b[1][0].channel).map(([, row]) => row);
  const rows = { qk: ordered(card.qk), v: ordered(card.v) };
  let x = card.x + CARD.pad;
  for (const { site, lanes, width } of sites) {
    rows[rowsOf(site)].forEach((row, i) => {
      for (const vertex of row.filter((one) => one.site === site)) {
        vertex.x = x + (i % lanes + 0.5) * pitch;
        vertex.y = card.top + CARD.title + (Math.floor(i / lanes) + 0.5) * pitch;
        place.set(vertex.id, vertex.y);
      }
    });
    x += width + CARD.between;
  }
}

/** Rounded areas behind a layer's attention and MLP. */
function blocksOf(parts, span) {
  const blocks = new Map();
  for (const part of parts.filter((one) => blockOf(one) !== null)) {
    const name = blockOf(part), start = blocks.get(name)?.start ?? part.x;
    blocks.set(name, { layer: part.layer, kind: name.split(".")[1], start, end: part.x + part.across });
  }
  return [...blocks.values()].map(({ layer, kind, start, end }) => ({ layer, kind, x: start - BLOCK_PAD,
    width: end - start + 2 * BLOCK_PAD, y: MARGIN.top - 14, height: span + 28 }));
}

/** The columns that a reader walks through and that are named above the graph, each from top to bottom. */
function walkedColumns(parts) {
  const columns = parts.flatMap((part) => part.kind === "heads" ? columnsOfStacks(part)
    : part.columns.map(({ site, layer, vertices }) => ({ site, layer, x: part.x + part.across / 2, vertices })));
  return columns.map((column) => ({ ...column, vertices: [...column.vertices].sort((a, b) => a.y - b.y || a.x - b.x) }));
}

function columnsOfStacks({ columns, sites, placed, stacks, x, cardWidth, layer }) {
  const found = [];
  for (let stack = 0; stack < stacks; stack++) {
    const here = new Set(placed.filter((card) => card.stack === stack).flatMap(({ ids }) => ids));
    let left = x + stack * (cardWidth + CARD.gap) + CARD.pad;
    for (const { site, width } of sites) {
      const vertices = columns.find((column) => column.site === site).vertices.filter(({ id }) => here.has(id));
      if (vertices.length) found.push({ site, layer, x: left + width / 2, vertices });
      left += width + CARD.between;
    }
  }
  return found;
}

/** The whole layout for a drawing area of `width` by `height` pixels. */
function layoutCircuit(vertices, edges, width, height) {
  const parts = partsOf(columnsOf(vertices), edges);
  const neighbours = neighbourTable(vertices, edges);
  const channels = orderRails(vertices, neighbours);
  const plan = choosePlan(parts, channels, width, height), { pitch, span, railGap } = plan;
  const fullWidth = placeParts(parts, plan);
  const box = { low: MARGIN.top, high: MARGIN.top + span };
  const railY = new Map(channels.map((channel, rank) => [channel, box.low + (rank + 0.5) * railGap]));
  const place = new Map();
  for (const vertex of vertices) if (!isToken(vertex) && onRail(vertex)) place.set(vertex.id, railY.get(vertex.channel));

  const of = (kind) => parts.filter((part) => part.kind === kind);
  for (const part of of("rails")) placeOnRails(part, railY, pitch);
  const heads = of("heads").flatMap((part) => placeHeads(part, neighbours, place, box, pitch));
  for (const part of of("free")) placeFree(part, neighbours, place, box, NODE_GAP_MOST);
  for (const part of of("tokens")) placeFree(part, neighbours, place, box, TOKEN_HEIGHT * plan.text);
  sizeNodes(vertices, pitch);
  return { columns: walkedColumns(parts), heads, blocks: blocksOf(parts, span), railGap, pitch, width: fullWidth,
    height: MARGIN.top + span + MARGIN.bottom, rails: railsOf(parts, channels, railY) };
}

/** The more important the larger, and none so large that it touches its neighbours. */
function sizeNodes(vertices, pitch) {
  const most = Math.min(8.8, pitch * 0.47);
  for (const vertex of vertices) if (!isToken(vertex)) vertex.radius = most * (0.52 + 0.48 * vertex.share);
}

/** One rail per channel, from just before the first block to the last column that is on rails. */
function railsOf(parts, channels, railY) {
  const carrying = parts.filter(({ kind }) => kind !== "tokens");
  if (carrying.length === 0) return [];
  const last = carrying.at(-1), start = carrying[0].x - RAIL_GUTTER, end = last.x + last.across;
  return channels.map((channel) => ({ channel, y: railY.get(channel), start, end }));
}
