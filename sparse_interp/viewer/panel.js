// What stands beside the graph: the pinned node in full, a head, or the welcome when nothing is pinned.

/** Everything known of one vertex. `acts` follows a link, lets go, knocks out, opens a head. */
function showVertex(panel, model, vertex, acts) {
  const head = isToken(vertex) || vertex.head === null ? null : model.head(vertex.layer, vertex.head);
  fillPanel(panel, placeOf(vertex), titleName(vertex), acts.close,
    ...(isToken(vertex) ? [] : [vertex.sentence ? el("p", { className: "lead" }, vertex.sentence) : null, statistics(vertex),
      knockOutCard(model, vertex, acts), nodePrompts(model, vertex), contexts(model, vertex), writes(model, vertex)]),
    head ? section(`Its head: ${headName(head)}`, el("p", {}, head.sentence),
      el("button", { type: "button", className: "quiet small", onclick: () => acts.openHead(head) }, "QK and OV reading")) : null,
    wires(model, vertex, "in", acts.follow), wires(model, vertex, "out", acts.follow));
}

/** The head of a panel, and below it whatever there is. */
function fillPanel(panel, eyebrow, title, close, ...cards) {
  panel.replaceChildren(
    el("div", { className: "detail-head" },
      el("div", {}, el("p", { className: "eyebrow" }, eyebrow), el("h2", {}, title)),
      close ? el("button", { type: "button", className: "quiet", onclick: close }, "Close") : null),
    ...cards.filter(Boolean));
  panel.scrollTop = 0;
}

function placeOf(vertex) {
  if (isToken(vertex)) return vertex.side === "embedding" ? "Read from the prompt" : "Decided at the end";
  return vertex.site === "final_read" ? "After the last layer" : `Layer ${vertex.layer}`;
}

/** The full name without its layer, which stands above it. */
function titleName(vertex) {
  const name = isToken(vertex) ? `Token ${tokenName(vertex.piece, 60)}` : fullName(vertex).replace(/^L\d+ /, "");
  return name[0].toUpperCase() + name.slice(1);
}

function statistics(vertex) {
  const rows = [["importance", vertex.importance], ["baseline", vertex.baseline], ...vertex.stats]
    .filter(([, value]) => value !== null && value !== undefined);
  if (rows.length === 0) return null;
  return el("dl", { className: "facts" }, ...rows.map(([name, value]) =>
    el("div", {}, el("dt", {}, name), el("dd", {}, number(value)))));
}

// -- knocking out ------------------------------------------------------------------------------------------------------

const OUTCOME_ROWS = [["KL from the model, nats", "kl"], ["lead of the right token, logits", "lead"], ["accuracy", "accuracy"], ["task loss, nats", "loss"]];

/** What was measured with `what` (a node, head or half) held at its baseline too, and a button that shows it. */
function knockOutCard(model, what, acts) {
  const out = knockable(model, what);
  if (!out) return null;
  const { whole } = model.data;
  const rows = OUTCOME_ROWS.filter(([, key]) => out.outcome[key] !== null && whole[key] !== null)
    .map(([name, key]) => [name, whole[key], out.outcome[key], out.outcome[key] - whole[key]]);
  const button = el("button", { type: "button", className: "quiet small knock", "aria-pressed": String(acts.isOut(out)) });
  const label = () => { button.textContent = button.getAttribute("aria-pressed") === "true" ? "Put it back" : "Knock it out"; };
  label();
  button.addEventListener("click", () => { button.setAttribute("aria-pressed", String(acts.knock(out))); label(); });
  const card = section("Without it", el("p", { className: "hint" }, "Held at its baseline, as everything outside the circuit is. Measured, not estimated."),
    tableOf({ title: `Without ${out.name}`, columns: ["what", "circuit", "without", "change"], rows, note: "" }), promptLeads(model, out.outcome));
  card.querySelector("h3").append(button);
  return card;
}

/** The lead on each of the page's prompts, before and after; a right answer that turns wrong says so. */
function promptLeads(model, outcome) {
  const { prompts, whole } = model.data;
  if (outcome.leads.length !== prompts.length || whole.leads.length !== prompts.length) return null;
  const rows = prompts.flatMap((prompt, i) => [[prompt.answer, 0], [prompt.foil, 1]].map(([next, side]) => {
    const [before, after] = [whole.leads[i][side], outcome.leads[i][side]];
    const turned = before > 0 && after <= 0 ? "now wrong" : before <= 0 && after > 0 ? "now right" : after > 0 ? "right" : "wrong";
    return [`${i + 1}${side ? ", twin" : ""} → ${tokenName(next)}`, before, after, turned];
  }));
  return el("details", {}, el("summary", {}, "On each prompt"),
    tableOf({ title: "Lead of the right token on each prompt, logits", columns: ["prompt", "circuit", "without", "answer"], rows, note: "" }));
}

// -- what a node does --------------------------------------------------------------------------------------------------

function nodePrompts(model, vertex) {
  if (!vertex.on_prompts.length) return null;
  const layers = [{ name: "activation", values: vertex.on_prompts, note: "In the whole model. Solid box: largest of its prompt; dashed: smallest; each where it stands out." },
    { name: "prompt − twin", values: differences(vertex.on_prompts), note: "What differs between the two prompts of a pair, at each token; each line less the other." }, channelScore(model, vertex)];
  return promptsCard(model, "On the task's prompts", layers);
}

/** What this channel of q and k adds to the score of every key, as the answer position asks. */
function channelScore(model, vertex) {
  const head = vertex.head === null ? null : model.head(vertex.layer, vertex.head);
  if (!head || !["q", "k"].includes(vertex.site)) return null;
  const other = model.nodes.find((node) => node.layer === vertex.layer && node.site === (vertex.site === "q" ? "k" : "q")
    && node.head === vertex.head && node.channel % head.d_head === vertex.channel % head.d_head);
  if (!other || !other.on_prompts.length) return null;
  const [q, k] = vertex.site === "q" ? [vertex, other] : [other, vertex];
  const scores = (asks, keys) => keys.map((key) => (asks.at(-1) ?? 0) * (key ?? 0) / Math.sqrt(head.d_head));
  return { name: "score", values: k.on_prompts.map((keys, i) => keys.map((side, j) => scores(q.on_prompts[i][j], side))),
    note: `q ${q.channel} at the answer position times k ${k.channel} at each token, over √${head.d_head}: what this channel adds to the attention score.` };
}

/** Contexts part by part, each token shaded by the node's activation there; the numbers are one press away. */
function contexts(model, vertex) {
  if (vertex.top_contexts.length === 0) return section("On text", el("p", { className: "none" }, "No contexts were recorded."));
  const largest = Math.max(1e-9, ...vertex.top_contexts.flatMap((c) => c.values.map((v) => Math.abs(v ?? 0))));
  const list = el("div", { className: "contexts" });
  for (const part of [...new Set(vertex.top_contexts.map((context) => context.part))]) {
    list.append(el("h4", {}, part[0].toUpperCase() + part.slice(1)), el("ol", {}, ...vertex.top_contexts
      .filter((context) => context.part === part).map((context) => contextRow(model, context, largest))));
  }
  const card = section("On text", vertex.histogram ? histogramOf(vertex.histogram, "its activations") : null, list);
  card.querySelector("h3").append(numbersToggle(list));
  return card;
}

function contextRow(model, context, largest) {
  const text = el("p", { className: "snippet" }, ...context.pieces.map((piece, i) =>
    shadedPiece(model.text(piece), context.values[i], largest, i === context.at ? "at" : null)));
  return el("li", {}, el("span", { className: "value" }, number(context.values[context.at], true)), text);
}

function writes(model, vertex) {
  if (vertex.writes.length === 0) return null;
  return section("What it writes", el("p", { className: "hint" }, "Change of a token's logit per unit of activation, on the direct path."),
    tokenColumns(model, vertex.writes, ["Promotes", "Suppresses"]));
}

/** The vertex's inputs or outputs as a list of links, weights first, by size. */
function wires(model, vertex, direction, pin) {
  const edges = model.incident(vertex.id).filter((edge) => (direction === "in" ? edge.target : edge.source) === vertex.id);
  edges.sort((a, b) => isWeight(b) - isWeight(a) || Math.abs(b.weight) - Math.abs(a.weight) || a.index - b.index);
  const title = `${direction === "in" ? "Inputs" : "Outputs"} · ${edges.length}`;
  if (edges.length === 0) return section(title, el("p", { className: "none" }, "none in this circuit"));
  const largest = Math.max(1e-9, ...edges.filter(isWeight).map((edge) => Math.abs(edge.weight)));
  const list = el("ul", { className: "wires" }), rows = edges.map((edge) => () => wireRow(model, edge, direction, largest, pin));
  list.append(...rows.slice(0, WIRES_AT_FIRST).map((row) => row()));
  const more = rows.length > WIRES_AT_FIRST ? el("button", { type: "button", className: "quiet small" }, `Show all ${rows.length}`) : null;
  if (more) more.addEventListener("click", () => { more.remove(); list.append(...rows.slice(WIRES_AT_FIRST).map((row) => row())); });
  return section(title, list, more);
}

const WIRES_AT_FIRST = 40;

function wireRow(model, edge, direction, largest, pin) {
  const other = model.vertex(direction === "in" ? edge.source : edge.target);
  const counted = isWeight(edge);
  const value = counted ? number(edge.weight, true) : { residual: "same rail", attention: "attention" }[edge.kind];
  return el("li", { className: counted ? signOf(edge) : "plain" },
    el("button", { type: "button", onclick: () => pin(other) },
      el("span", { className: "end" }, fullName(other)), counted ? meter(Math.abs(edge.weight) / largest) : el("span"),
      el("span", { className: "value" }, value)));
}

// -- heads and the welcome ---------------------------------------------------------------------------------------------

/** A head in full: where it looks on each prompt, what makes it look there, what it carries. */
function showHead(panel, model, head, acts) {
  const look = (name, values, note) => ({ name, values, note });
  const less = head.attention.map((pair, i) => pair.map((side, j) => side.map((paid, k) => (head.in_circuit[i]?.[j]?.[k] ?? 0) - (paid ?? 0))));
  fillPanel(panel, `Layer ${head.layer}`, `Head ${head.head}`, acts.close, el("p", { className: "lead" }, head.sentence), knockOutCard(model, head, acts),
    promptsCard(model, "Where the answer position looks", [
      look("model", head.attention, "Attention in the whole model; what is missing from 1 goes to the first token and the sink."),
      look("circuit", head.in_circuit, "Attention while the model runs as the circuit."),
      look("circuit − model", less, "Where the circuit looks more (above 0) or less (below 0) than its model.")]),
    ...head.tables.map(tableCard),
    section("Its nodes", el("ul", { className: "wires" }, ...model.nodes.filter((node) => node.layer === head.layer && node.head === head.head)
      .map((node) => linkRow(fullName(node), node.importance, 1, () => acts.follow(node))))));
}

function linkRow(name, value, largest, follow) {
  return el("li", { className: "plain" }, el("button", { type: "button", onclick: follow }, el("span", { className: "end" }, name),
    value === null ? el("span") : meter(value / largest), el("span", { className: "value" }, number(value))));
}

/** What a reader sees before pinning anything: how to read the page, the task, and where to begin. */
function showWelcome(panel, model, acts) {
  const { data } = model, ranked = byNeed(model.nodes.filter((node) => node.importance !== null), (node) => node.importance).slice(0, 8);
  fillPanel(panel, "Nothing pinned", "Choose a node", null,
    el("p", { className: "lead" }, "Click a node, or press Enter on it, to see what activates it, what it writes and what it is joined to. " +
      "Rails are residual channels: one keeps its height through every layer."),
    promptsCard(model, "The task", []),
    ranked.length ? section("Most important nodes", el("ul", { className: "wires" }, ...ranked.map((node) =>
      linkRow(fullName(node), node.importance, Math.max(1e-9, ranked[0].importance), () => acts.follow(node))))) : null,
    costCard(model, "Layers", data.halves, (half) => `${halfName(half)} · ${plural(half.n_nodes, "node")}`, acts.openHalf),
    costCard(model, "Heads", data.heads, headName, acts.openHead));
}

function byNeed(items, need) {
  return [...items].sort((a, b) => need(b) - need(a));
}

/** Layers or heads by what the circuit loses without them. */
function costCard(model, title, items, name, open) {
  if (items.length === 0) return null;
  const { whole } = model.data;
  const key = whole && items.every((item) => item.knock_out && item.knock_out.kl !== null) && whole.kl !== null ? "kl" : "loss";
  const cost = (item) => (whole && item.knock_out && item.knock_out[key] !== null ? item.knock_out[key] - whole[key] : null);
  const sorted = byNeed(items, (item) => cost(item) ?? -Infinity), largest = Math.max(1e-9, ...sorted.map((item) => cost(item) ?? 0));
  const unit = key === "kl" ? "Growth of KL from the model without it, nats." : "Growth of the task loss without it, nats.";
  return section(title, whole ? el("p", { className: "hint" }, unit) : null,
    el("ul", { className: "wires" }, ...sorted.map((item) => linkRow(name(item), cost(item), largest, () => open(item)))));
}

/** One half block: what is lost without it, and its nodes by importance. */
function showHalf(panel, model, half, acts) {
  const members = byNeed(model.nodes.filter((node) => node.layer === half.layer && halfOf(node) === half.kind), (node) => node.importance ?? 0);
  const weights = model.edges.filter((edge) => edge.kind === "weight" && members.includes(model.vertex(edge.source)));
  const largest = Math.max(1e-9, ...members.map((node) => node.importance ?? 0));
  const strongest = weights.reduce((best, edge) => Math.max(best, Math.abs(edge.weight)), 0);
  fillPanel(panel, plural(half.n_nodes, "node"), halfName(half), acts.close,
    el("dl", { className: "facts" }, ...[["edges that leave its nodes", weights.length], ["largest weight", strongest]].map(([name, value]) =>
      el("div", {}, el("dt", {}, name), el("dd", {}, number(value))))),
    knockOutCard(model, half, acts),
    section("Its nodes", el("ul", { className: "wires" }, ...members.map((node) => linkRow(fullName(node), node.importance, largest, () => acts.follow(node))))));
}
