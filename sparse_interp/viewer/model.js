// The payload with what drawing needs: lookups, sizes, each edge's share of the strongest of its kind, and what is out.

const EDGE_KINDS = ["weight", "residual", "attention", "embedding", "unembedding"];

/** One circuit of the payload; `pieces` is the table of texts, which a circuit to compare with shares. */
function readModel(data, pieces) {
  const vertices = [...data.nodes, ...data.tokens];
  const byId = new Map(vertices.map((vertex) => [vertex.id, vertex]));
  const edges = data.edges.map(([source, target, weight, kind], index) => ({
    source: vertices[source].id, target: vertices[target].id, weight: weight ?? 0, kind: EDGE_KINDS[kind], index, off: false,
  }));
  const touching = new Map(vertices.map((vertex) => [vertex.id, []]));
  for (const edge of edges) {
    touching.get(edge.source).push(edge);
    touching.get(edge.target).push(edge);
  }
  measureEdges(edges);
  measureVertices(data);
  const incident = (id) => touching.get(id);
  const heads = new Map(data.heads.map((head) => [`${head.layer}.${head.head}`, head]));
  return { data, vertices, edges, nodes: data.nodes, pieces, vertex: (id) => byId.get(id), incident,
    head: (layer, head) => heads.get(`${layer}.${head}`), text: (index) => pieces[index],
    spoken: (vertex) => spokenName(vertex, incident(vertex.id)) };
}

function measureEdges(edges) {
  const strongest = {};
  for (const edge of edges) strongest[edge.kind] = Math.max(strongest[edge.kind] || 1e-9, Math.abs(edge.weight));
  for (const edge of edges) edge.share = Math.abs(edge.weight) / strongest[edge.kind];
}

/** Importance is darkness and size, relative to the most important node. */
function measureVertices({ nodes }) {
  const largest = Math.max(1e-9, ...nodes.map((node) => node.importance ?? 0));
  for (const node of nodes) {
    const share = node.importance === null ? 0.4 : Math.sqrt(clamp(node.importance / largest, 0, 1));
    Object.assign(node, { share, fill: (0.06 + 0.94 * share).toFixed(3) });
  }
}

function spokenName(vertex, edges) {
  const inputs = edges.filter((edge) => edge.target === vertex.id && isWeight(edge)).length;
  const outputs = edges.filter((edge) => edge.source === vertex.id && isWeight(edge)).length;
  const importance = isToken(vertex) || vertex.importance === null ? "" : `, importance ${number(vertex.importance)}`;
  return `${fullName(vertex)}${importance}, ${plural(inputs, "input")}, ${plural(outputs, "output")}`;
}

/** What can be knocked out: a name, the ids of its nodes, and what was measured without them. */
function knockable(model, what) {
  const { whole } = model.data;
  if (!whole || !what || !what.knock_out) return null;
  if (what.id !== undefined) return { name: fullName(what), ids: new Set([what.id]), outcome: what.knock_out };
  const inHead = (node) => node.layer === what.layer && node.head === what.head;
  const inHalf = (node) => node.layer === what.layer && halfOf(node) === what.kind;
  const members = model.nodes.filter(what.kind === undefined ? inHead : inHalf);
  return { name: what.kind === undefined ? headName(what) : halfName(what), ids: new Set(members.map((node) => node.id)), outcome: what.knock_out };
}

function halfOf(node) {
  if (["mlp_read", "neuron", "mlp_write"].includes(node.site)) return "MLP";
  return node.site === "final_read" ? null : "attention";
}

function headName({ layer, head }) { return `L${layer} head ${head}`; }

function halfName({ layer, kind }) { return `Layer ${layer} ${kind}`; }
