// Two circuits side by side, drawn alike. Of one model their nodes have the same names, so what both have is told apart
// from what one has alone: shared nodes wear a ring. Of two models only numbers can be compared.

function showCompare(view, data, { follow }) {
  const [model, other] = [data, data.other].map((one) => readModel(structuredClone(one), data.pieces));
  const same = model.data.model_sha256 !== "" && model.data.model_sha256 === other.data.model_sha256;
  const status = el("p", { className: "told", role: "status" }, "Point at a node, or walk with the arrow keys.");
  const sides = [model, other].map((one, i) => side(one, i, status));
  view.replaceChildren(el("div", { className: "sides" }, ...sides.map(({ holder }) => holder)), status,
    el("div", { className: "paper" }, tableCard(countTable(model, other, same)), tableCard(summaryTable(model, other)),
      same ? section("Nodes of both", el("ul", { className: "wires" }, ...shared(model, other).slice(0, 60).map((node) => linkRow(fullName(node), node.importance, 1, () => follow(node.id))))) : null));
  const both = new Set(same ? shared(model, other).map((node) => node.id) : []);
  for (const { graph } of sides) { graph.draw(); graph.markShared(both); }

  function side(one, i, said) {
    const stage = el("div", { className: "stage" });
    const kind = one.data.audit === null ? "missing" : OUTCOMES.get(one.data.audit.passed)[0];
    const word = one.data.audit === null ? "! not audited" : `${OUTCOMES.get(one.data.audit.passed)[1]} ${outcomeOf(one.data.audit)}`;
    const holder = el("section", { className: "side", "aria-label": one.data.title }, el("h2", {}, i === 0 ? `This: ${one.data.title}` : `Other: ${one.data.title}`),
      el("p", { className: "hint" }, [one.data.model, one.data.task].filter(Boolean).join(" · "), " ", el("span", { className: `badge is-${kind}` }, word)), stage);
    const tell = (vertex) => {
      graph.highlight(vertex ? vertex.id : null);
      if (!vertex) return;
      const twin = same ? [model, other][1 - i].vertex(vertex.id) : null;
      said.textContent = one.spoken(vertex) + (same && !isToken(vertex) ? (twin ? `. Both have it; there its importance is ${number(twin.importance)}.` : ". The other circuit lacks it.") : "");
      sides[1 - i].graph.highlight(twin ? twin.id : null);
    };
    const graph = createGraph(stage, one, { hover: tell, focus: tell, hoverEdge: () => {}, pin: (vertex) => (i === 0 ? follow(vertex.id) : tell(vertex)) }, `compare${i}`);
    return { holder, graph };
  }
}

function shared(model, other) {
  return byNeed(model.nodes.filter((node) => other.vertex(node.id)), (node) => node.importance ?? 0);
}

/** Nodes by site, edges, and how much of them both have. */
function countTable(model, other, same) {
  const key = (edge) => `${edge.source} ${edge.target}`;
  const parts = [["nodes", model.nodes, other.nodes, (node) => node.id],
    ...Object.keys(SITE_NAMES).map((site) => [SITE_NAMES[site], ...[model, other].map((one) => one.nodes.filter((node) => node.site === site)), (node) => node.id]),
    ["edges", ...[model, other].map((one) => one.edges.filter((edge) => edge.kind === "weight")), key]];
  const rows = parts.filter(([, ours, theirs]) => ours.length + theirs.length > 0).map(([name, ours, theirs, id]) => {
    const mine = new Set(ours.map(id)), both = [...new Set(theirs.map(id))].filter((one) => mine.has(one)).length;
    const either = mine.size + new Set(theirs.map(id)).size - both;
    return same ? [name, ours.length, theirs.length, both, both / either] : [name, ours.length, theirs.length];
  });
  const columns = ["what", "this", "other", ...(same ? ["both", "Jaccard"] : [])];
  const note = same ? "Circuits of one model: nodes and edges are the same where their ends are." : "Circuits of two models: their nodes have nothing in common but names, so only counts are compared.";
  return { title: "How much there is", columns, rows, note };
}

function summaryTable(model, other) {
  const [ours, theirs] = [model, other].map((one) => new Map(one.data.summary));
  const audits = [model, other].map((one) => one.data.audit);
  const rows = [...new Set([...ours.keys(), ...theirs.keys()])].map((name) => [name, ours.get(name) ?? null, theirs.get(name) ?? null]);
  return { title: "What was measured", columns: ["what", "this", "other"], rows: [...rows,
    ["audit", ...audits.map((audit) => (audit === null ? "missing" : outcomeOf(audit)))],
    ["verdict", ...audits.map((audit) => (audit === null ? null : audit.verdict))]], note: "" };
}
