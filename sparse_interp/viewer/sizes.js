// How large everything is. A column with more nodes than the window is high is wrapped into lanes, and heads into several
// columns of cards, so that the drawing takes the shape of the window whatever the shape of the circuit. Nodes move
// closer and shrink first; what does not fit even then is laid out in a larger world and shown from further away.

/** How near nodes stand to each other, in pixels, from roomy to crowded. */
const PITCHES = [30, 26, 22, 19, 17, 15, 13.5, 12, 11];
/** How much larger the world becomes at a time, once the smallest pitch does not fit. */
const LARGER = 1.08;
/** Around everything; rails begin before the first block, and carry their channel numbers there. */
const MARGIN = { top: 26, right: 22, bottom: 26, left: 16 };
const RAIL_GUTTER = 38;
/** Pixels between parts that stand beside each other: at least, and their share of the width that is left over. */
const GAPS = {
  wires: { least: 30, share: 1 }, blocks: { least: 30, share: 0.5 },
  tokensIn: { least: 20 + RAIL_GUTTER, share: 1 }, tokensOut: { least: 44, share: 1 },
};
/** The card of a head: the line with its name, what is between two cards, around q, k and v, and between these. */
const CARD = { title: 17, gap: 7, pad: 8, between: 7 };
/** Farthest that rails, and nodes off the rails, stand apart where there is room. */
const RAIL_GAP_MOST = 84, NODE_GAP_MOST = 36;
const TOKEN_HEIGHT = 30;
/** Tokens are read as text: where the world is shown smaller they are drawn larger, up to this. */
const TOKEN_SCALE_MOST = 1.7;
const MLP_SITES = ["mlp_read", "neuron", "mlp_write"];

function clamp(value, low, high) {
  return Math.max(low, Math.min(high, value));
}

/** Columns as they are placed: q, k and v of a layer are one part, all others are one each. */
function partsOf(columns, edges) {
  const parts = [];
  for (const column of columns) {
    const kind = kindOf(column), last = parts.at(-1);
    if (kind === "heads" && last?.kind === kind && last.layer === column.layer) last.columns.push(column);
    else parts.push({ kind, layer: column.layer, columns: [column], vertices: column.vertices });
  }
  for (const part of parts.filter(({ kind }) => kind === "heads")) part.cards = cardsOf(part);
  const crossing = countCrossing(parts, edges);
  parts.forEach((part, i) => {
    const { least, share } = i === 0 ? { least: 0, share: 0 } : GAPS[gapBetween(parts[i - 1], part)];
    part.gap = { least, share: share * (1 + Math.sqrt(crossing[i]) / 20) };
  });
  return parts;
}

/** How many weights join each part to the one before it: where there are many, they need room to be told apart. */
function countCrossing(parts, edges) {
  const at = new Map(parts.flatMap(({ columns }, i) => columns.flatMap(({ vertices }) => vertices.map(({ id }) => [id, i]))));
  const counts = Array(parts.length).fill(0);
  for (const { source, target } of edges.filter(isWeight)) if (at.get(source) === at.get(target) - 1) counts[at.get(target)]++;
  return counts;
}

function kindOf({ site, layer }) {
  if (["q", "k", "v"].includes(site)) return "heads";
  if (site === "neuron") return "free";
  return layer === null && site !== "final_read" ? "tokens" : "rails";
}

function gapBetween(left, right) {
  if (left.kind === "tokens") return "tokensIn";
  if (right.kind === "tokens") return "tokensOut";
  return blockOf(left) === blockOf(right) ? "wires" : "blocks";
}

/** The name of a layer's attention or MLP; null for what is in neither. */
function blockOf({ layer, columns }) {
  return layer === null ? null : `${layer}.${MLP_SITES.includes(columns[0].site) ? "MLP" : "attention"}`;
}

/** The heads of a layer; q and k of one channel meet in a score, so they share a row. */
function cardsOf({ columns, layer }) {
  const heads = new Map();
  for (const { site, vertices } of columns) {
    for (const vertex of vertices) {
      const key = vertex.head ?? -1, rows = rowsOf(site);
      if (!heads.has(key)) heads.set(key, { head: vertex.head, layer, key: String(key).padStart(4, "0"), qk: new Map(), v: new Map(), ids: [] });
      const card = heads.get(key);
      card[rows].set(vertex.channel, [...(card[rows].get(vertex.channel) || []), vertex]);
      card.ids.push(vertex.id);
    }
  }
  return [...heads.values()];
}

function rowsOf(site) {
  return site === "v" ? "v" : "qk";
}

/** The roomiest pitch, and then the smallest world in the shape of the window, in which everything fits side by side. */
function choosePlan(parts, channels, width, height) {
  for (const pitch of PITCHES) {
    const plan = planOf(parts, channels, { width, height, pitch, scale: 1 });
    if (plan.needed <= width) return plan;
  }
  for (let scale = LARGER; ; scale *= LARGER) {
    const plan = planOf(parts, channels, { width: width * scale, height: height * scale, pitch: PITCHES.at(-1), scale });
    if (plan.needed <= plan.width || scale > 40) return plan;
  }
}

/** What every part needs in a world of this size: lanes, and how far it reaches across. */
function planOf(parts, channels, { width, height, pitch, scale }) {
  const text = Math.min(scale, TOKEN_SCALE_MOST);
  const natural = Math.max(220, channels.length * RAIL_GAP_MOST, ...parts.map((part) => naturalHeight(part, pitch)));
  const span = Math.max(pitch, Math.min(height - MARGIN.top - MARGIN.bottom, natural));
  const railGap = channels.length ? span / channels.length : pitch;
  const rank = new Map(channels.map((channel, i) => [channel, i]));
  const sizes = parts.map((part) => SIZED[part.kind](part, { span, pitch, railGap, rank, text }));
  const needed = MARGIN.left + MARGIN.right + sizes.reduce((sum, { across }, i) => sum + across + parts[i].gap.least, 0);
  return { sizes, needed, width, height, pitch, span, railGap, text };
}

/** How high a part would like to be. */
function naturalHeight(part, pitch) {
  if (part.kind === "heads") return part.cards.reduce((sum, card) => sum + cardHeight(card, Infinity, pitch), 0);
  return part.vertices.length * (part.kind === "tokens" ? TOKEN_HEIGHT : NODE_GAP_MOST);
}

const SIZED = {
  /** Nodes on rails that are closer than nodes may be stand in different lanes. */
  rails({ vertices }, { pitch, railGap, rank }) {
    const heights = vertices.map(({ channel }) => rank.get(channel) * railGap).sort((a, b) => a - b);
    const lanes = Math.max(...firstFit(heights, pitch)) + 1;
    return { lanes, across: lanes * pitch };
  },
  free({ vertices }, { span, pitch }) {
    const lanes = Math.ceil(vertices.length * pitch / span);
    return { lanes, across: lanes * pitch };
  },
  tokens({ vertices }, { span, text }) {
    const lanes = Math.ceil(vertices.length * TOKEN_HEIGHT * text / span);
    for (const token of vertices) Object.assign(token, { scale: text, halfWidth: text * (9 + 3.8 * Array.from(shortName(token)).length) });
    return { lanes, across: lanes * 2 * (Math.max(...vertices.map(({ halfWidth }) => halfWidth)) + 4) };
  },
  /** Cards have as many rows as make the heads of the layer narrowest. */
  heads(part, { span, pitch }) {
    const longest = Math.max(...part.cards.map((card) => Math.max(card.qk.size, card.v.size)));
    const packed = Array.from({ length: longest }, (_, i) => packCards(part, longest - i, span, pitch));
    return packed.reduce((best, tried) => (tried.across < best.across ? tried : best));
  },
};

/** A lane for each of `heights`, from above: the first in which the one before is a pitch away. */
function firstFit(heights, pitch) {
  const last = [];
  return heights.map((y) => {
    const free = last.findIndex((before) => y - before >= pitch - 1e-6), lane = free < 0 ? last.length : free;
    last[lane] = y;
    return lane;
  });
}

/** Cards of at most `rows` rows, in as few columns as the span allows; all cards of a layer are equally wide. */
function packCards({ cards, columns }, rows, span, pitch) {
  const sites = columns.map(({ site }) => {
    const lanes = Math.max(1, ...cards.map((card) => Math.ceil(card[rowsOf(site)].size / rows)));
    return { site, lanes, width: lanes * pitch };
  });
  const cardWidth = 2 * CARD.pad + CARD.between * (sites.length - 1) + sites.reduce((sum, { width }) => sum + width, 0);
  const heights = cards.map((card) => cardHeight(card, rows, pitch));
  let n = Math.ceil(heights.reduce((a, b) => a + b, 0) / span);
  while (n < cards.length && Math.max(...stacked(heights, n).heights) > span) n++;
  return { rows, sites, cardWidth, stacks: n, across: n * cardWidth + (n - 1) * CARD.gap };
}

function cardHeight(card, rows, pitch) {
  return CARD.title + CARD.gap + CARD.pad / 2 + Math.min(rows, Math.max(card.qk.size, card.v.size)) * pitch;
}

/** Which of `n` stacks each item goes to, namely the one that is lowest so far, and how high they become. */
function stacked(sizes, n) {
  const heights = Array(n).fill(0);
  const where = sizes.map((size) => {
    const lowest = heights.indexOf(Math.min(...heights));
    heights[lowest] += size;
    return lowest;
  });
  return { where, heights };
}
