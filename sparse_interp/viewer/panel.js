// What stands beside the graph: the pinned node in full, the welcome when none is pinned, and the audit.

function section(title, ...children) {
  return el("section", { className: "card" }, el("h3", {}, title), ...children);
}

/** Everything known of one vertex. `pin` follows a link to another; `close` lets this one go. */
function showVertex(panel, model, vertex, pin, close) {
  panel.replaceChildren(
    el("div", { className: "detail-head" },
      el("div", {}, el("p", { className: "eyebrow" }, placeOf(vertex)), el("h2", {}, titleName(vertex))),
      el("button", { type: "button", className: "quiet", "aria-label": "Unpin this node", onclick: close }, "Close")),
    ...(isToken(vertex) ? [] : [statistics(vertex), contexts(model, vertex), writes(vertex)]).filter(Boolean),
    wires(model, vertex, "in", pin), wires(model, vertex, "out", pin));
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

/** Contexts with each token shaded by the node's activation there; the numbers are one press away. */
function contexts(model, vertex) {
  if (vertex.top_contexts.length === 0) return section("Where it is active", el("p", { className: "none" }, "No contexts were recorded."));
  const largest = Math.max(1e-9, ...vertex.top_contexts.flatMap((c) => c.values.map((v) => Math.abs(v ?? 0))));
  const list = el("div", { className: "contexts" });
  const names = { task: "On the task's prompts", text: "On ordinary text" };
  for (const source of [...new Set(vertex.top_contexts.map((context) => context.source))]) {
    list.append(el("h4", {}, names[source] || source), el("ol", {}, ...vertex.top_contexts
      .filter((context) => context.source === source).map((context) => contextRow(model, context, largest))));
  }
  const toggle = el("button", { type: "button", className: "quiet small contexts-toggle", "aria-pressed": "false" }, "Show numbers");
  toggle.addEventListener("click", () => toggle.setAttribute("aria-pressed", String(list.classList.toggle("numbered"))));
  const card = section("Where it is active", list);
  card.querySelector("h3").append(toggle);
  return card;
}

function contextRow(model, context, largest) {
  const text = el("p", { className: "snippet" });
  context.pieces.forEach((piece, index) => {
    const value = context.values[index];
    const shaded = el("span", { className: "piece", title: number(value, true) }, visible(model.pieces[piece]));
    if (value) {
      shaded.classList.add(value < 0 ? "negative" : "positive");
      shaded.style.setProperty("--share", Math.min(1, Math.abs(value) / largest).toFixed(3));
      shaded.append(el("span", { className: "figure" }, number(value, true)));
    }
    if (index === context.at) shaded.classList.add("at");
    text.append(shaded);
  });
  return el("li", {}, el("span", { className: "value" }, number(context.values[context.at], true)), text);
}

/** Promoted on one side, suppressed on the other, strongest first. */
function writes(vertex) {
  if (vertex.writes.length === 0) return null;
  const sorted = [...vertex.writes].sort((a, b) => Math.abs(b[1]) - Math.abs(a[1]));
  const largest = Math.max(1e-9, Math.abs(sorted[0][1]));
  const column = (title, kept, sign) => el("div", { className: `writes ${sign}` }, el("h4", {}, title),
    kept.length === 0 ? el("p", { className: "none" }, "none") : el("ul", {}, ...kept.map(([token, effect]) =>
      el("li", {}, el("code", {}, tokenName(token)), meter(Math.abs(effect) / largest), el("span", { className: "value" }, number(effect, true))))));
  return section("What it writes", el("p", { className: "hint" }, "Change of a token's logit per unit of activation."),
    el("div", { className: "two" },
      column("Promotes", sorted.filter((write) => write[1] > 0), "positive"),
      column("Suppresses", sorted.filter((write) => write[1] < 0), "negative")));
}

function meter(share) {
  const bar = el("span", { className: "meter", "aria-hidden": "true" }, el("i"));
  bar.firstChild.style.setProperty("--share", Math.max(0.02, share).toFixed(3));
  return bar;
}

/** The vertex's inputs or outputs as a list of links, weights first, by size. */
function wires(model, vertex, direction, pin) {
  const edges = model.incident(vertex.id).filter((edge) => (direction === "in" ? edge.target : edge.source) === vertex.id);
  edges.sort((a, b) => isWeight(b) - isWeight(a) || Math.abs(b.weight) - Math.abs(a.weight) || a.index - b.index);
  const title = `${direction === "in" ? "Inputs" : "Outputs"} · ${edges.length}`;
  if (edges.length === 0) return section(title, el("p", { className: "none" }, "none in this circuit"));
  const largest = Math.max(1e-9, ...edges.filter(isWeight).map((edge) => Math.abs(edge.weight)));
  return section(title, el("ul", { className: "wires" }, ...edges.map((edge) => wireRow(model, edge, direction, largest, pin))));
}

function wireRow(model, edge, direction, largest, pin) {
  const other = model.vertex(direction === "in" ? edge.source : edge.target);
  const counted = isWeight(edge);
  const value = counted ? number(edge.weight, true) : { residual: "same rail", attention: "attention" }[edge.kind];
  return el("li", { className: counted ? signOf(edge) : "plain" },
    el("button", { type: "button", onclick: () => pin(other) },
      el("span", { className: "end" }, fullName(other)), counted ? meter(Math.abs(edge.weight) / largest) : el("span"),
      el("span", { className: "value" }, value)));
}

/** What a reader sees before pinning anything: how to read the page, the task, and where to begin. */
function showWelcome(panel, model, pin) {
  const data = model.data;
  const ranked = model.nodes.filter((node) => node.importance !== null).sort((a, b) => b.importance - a.importance).slice(0, 8);
  const largest = ranked.length ? Math.max(1e-9, ranked[0].importance) : 1;
  panel.replaceChildren(
    el("div", { className: "detail-head" }, el("div", {}, el("p", { className: "eyebrow" }, "Nothing pinned"), el("h2", {}, "Choose a node"))),
    el("p", { className: "lead" }, "Click a node, or press Enter on it, to see what activates it, what it writes and what it is joined to. " +
      "Rails are residual channels: one keeps its height through every layer."),
    ...[data.prompts.length ? promptCard(model) : null,
      ranked.length ? section("Most important nodes", el("ul", { className: "wires" }, ...ranked.map((node) =>
        el("li", { className: "plain" }, el("button", { type: "button", onclick: () => pin(node) },
          el("span", { className: "end" }, fullName(node)), meter(node.importance / largest),
          el("span", { className: "value" }, number(node.importance))))))) : null].filter(Boolean));
}

function promptCard(model) {
  const line = (pieces, next, other) => el("p", { className: "snippet" },
    ...pieces.map((piece) => el("span", { className: "piece" }, visible(model.pieces[piece]))),
    el("span", { className: "next" }, tokenName(next)), el("span", { className: "against" }, `not ${tokenName(other)}`));
  return section("The task", el("ol", { className: "prompts" }, ...model.data.prompts.map((prompt) =>
    el("li", {}, line(prompt.pieces, prompt.answer, prompt.foil),
      prompt.twin.length ? line(prompt.twin, prompt.foil, prompt.answer) : null))));
}

const OUTCOMES = new Map([[true, ["pass", "✓", "pass"]], [false, ["fail", "✕", "fail"]], [null, ["open", "–", "not judged"]]]);

/** The strip under the heading: nobody reads the graph without passing the verdict. */
function showVerdict(strip, tab, audit, openAudit) {
  const counts = auditCounts(audit);
  const kind = audit === null ? "missing" : OUTCOMES.get(audit.passed)[0];
  const words = { missing: "Audit missing", pass: "Audit passed", fail: "Audit failed", open: "Audit without a verdict" }[kind];
  const failed = counts.judged - counts.passed;
  strip.className = `verdict is-${kind}`;
  strip.replaceChildren(...[
    el("span", { className: "mark", "aria-hidden": "true" }, { missing: "!", pass: "✓", fail: "✕", open: "–" }[kind]),
    el("strong", {}, words),
    el("span", { className: "words" }, audit === null
      ? "Nobody has measured whether this circuit does what the model does. Read the graph as a guess." : audit.verdict),
    failed ? el("span", { className: "badge is-fail" }, `${plural(failed, "check")} failed`) : null,
    el("button", { type: "button", className: "quiet", onclick: openAudit }, "See the audit")].filter(Boolean));
  tab.replaceChildren("Audit ", el("span", { className: `badge is-${kind === "pass" && failed ? "fail" : kind}` },
    audit === null ? "missing" : `${counts.passed} of ${counts.judged} passed`));
}

function auditCounts(audit) {
  const judged = audit === null ? [] : audit.rows.filter((row) => row.passed !== null);
  return { judged: judged.length, passed: judged.filter((row) => row.passed).length };
}

function showAudit(view, audit) {
  if (audit === null) {
    view.replaceChildren(el("div", { className: "paper" }, el("h2", {}, "This circuit comes without an audit"),
      el("p", { className: "lead" }, "Without one, nothing here says whether the circuit behaves like its model on held-out prompts, " +
        "whether the model needs it, or whether a random circuit of equal size would do as well.")));
    return;
  }
  const head = ["measure", "condition", "value", "interval", "n", "split", "result", "note"];
  const numeric = new Set(["value", "interval", "n"]);
  view.replaceChildren(el("div", { className: "paper" },
    el("h2", {}, "What this circuit is worth"), el("p", { className: "lead" }, audit.verdict),
    el("div", { className: "scroller", tabIndex: 0, role: "region", "aria-label": "Audit table" }, el("table", { className: "audit" },
      el("caption", { className: "hidden" }, "Every measurement of the audit, controls beside claims"),
      el("thead", {}, el("tr", {}, ...head.map((name) => el("th", { scope: "col", className: numeric.has(name) ? "numeric" : "" }, name)))),
      el("tbody", {}, ...auditRows(audit.rows))))));
}

/** A measure is named once for the rows that share it, so that a claim and its controls read as one group. */
function auditRows(rows) {
  return rows.map((row, index) => {
    const first = index === 0 || rows[index - 1].measure !== row.measure;
    let span = 1;
    while (rows[index + span] && rows[index + span].measure === row.measure) span++;
    const [kind, mark, word] = row.value === null ? ["open", "–", "not run"] : OUTCOMES.get(row.passed);
    const interval = row.low === null || row.high === null ? "" : `${number(row.low)} to ${number(row.high)}`;
    return el("tr", { className: first ? "first" : "" },
      first ? el("th", { scope: "rowgroup", rowSpan: span }, row.measure) : null,
      el("td", {}, row.condition), el("td", { className: "numeric strong" }, number(row.value)),
      el("td", { className: "numeric" }, interval), el("td", { className: "numeric" }, row.n === null ? "" : number(row.n)),
      el("td", {}, row.split),
      el("td", {}, el("span", { className: `outcome is-${kind}` }, el("span", { "aria-hidden": "true" }, mark), ` ${word}`)),
      el("td", { className: "note" }, row.note));
  });
}
