// The audit: a strip that nobody reads the graph without passing, and a tab with every measurement.

const OUTCOMES = new Map([[true, ["pass", "✓", "pass"]], [false, ["fail", "✕", "fail"]], [null, ["open", "–", "not judged"]]]);
const LEVELS = { quick: "A quick audit: nothing was searched for anew, so controls that need a search were not run.",
  full: "A full audit: controls were searched for as the circuit was." };

/** The strip under the heading. */
function showVerdict(strip, tab, audit, openAudit) {
  const counts = auditCounts(audit);
  const kind = audit === null ? "missing" : OUTCOMES.get(audit.passed)[0];
  const failed = counts.judged - counts.passed;
  strip.className = `verdict is-${kind}`;
  strip.replaceChildren(...[
    el("span", { className: "mark", "aria-hidden": "true" }, { missing: "!", pass: "✓", fail: "✕", open: "–" }[kind]),
    el("strong", {}, audit === null ? "Audit missing" : capital(outcomeOf(audit))),
    el("span", { className: "words" }, audit === null
      ? "Nobody has measured whether this circuit does what the model does. Read the graph as a guess." : audit.verdict),
    failed ? el("span", { className: "badge is-fail" }, `${plural(failed, "check")} failed`) : null,
    el("button", { type: "button", className: "quiet", onclick: openAudit }, "See the audit")].filter(Boolean));
  tab.replaceChildren("Audit ", el("span", { className: `badge is-${kind === "pass" && failed ? "fail" : kind}` },
    audit === null ? "missing" : `${counts.passed} of ${counts.judged} passed`));
}

/** What came of an audit, with the level that it was made at. */
function outcomeOf({ level, passed }) {
  return [level, "audit", passed === null ? "without a verdict" : passed ? "passed" : "failed"].filter(Boolean).join(" ");
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
  const body = el("tbody", {}), count = el("p", { className: "hint", role: "status" });
  const kinds = [["All", () => true], ["Deciding", (row) => row.decides], ["Failed", (row) => row.passed === false],
    ["Not run", (row) => row.value === null]].filter(([, keep], i) => i === 0 || audit.rows.some(keep));
  const show = (i) => {
    const rows = audit.rows.filter(kinds[i][1]);
    body.replaceChildren(...auditRows(rows));
    count.textContent = `${rows.length} of ${plural(audit.rows.length, "row")}`;
  };
  show(0);
  view.replaceChildren(el("div", { className: "paper" },
    el("h2", {}, "What this circuit is worth"), LEVELS[audit.level] ? el("p", { className: "hint" }, LEVELS[audit.level]) : null, verdictLead(audit),
    audit.headline ? el("p", { className: "lead" }, `${capital(audit.headline)}.`) : null,
    audit.questions.length ? el("ul", { className: "questions" }, ...audit.questions.map((one) => question(one, audit.rows))) : null,
    el("div", { className: "filters" }, choiceOf("Which rows", kinds.map(([name]) => name), show), count),
    auditTable(body), ...audit.curves.map(curveCard)));
}

/** Where the questions below give the reasons, the verdict's first words are enough. */
function verdictLead({ questions, verdict }) {
  if (questions.length === 0) return el("p", { className: "lead verdict-lead" }, capital(verdict));
  const kept = questions.filter(({ passed }) => passed).length;
  return el("p", { className: "lead verdict-lead" }, `${capital(verdict.split(/[:;]/)[0])}: ${kept} of the ${questions.length} things that a verdict rests on are kept.`);
}

function capital(words) {
  return words ? words[0].toUpperCase() + words.slice(1) : "";
}

/** One of the things that the verdict rests on, with every number that decides about it. */
function question({ about, passed, why }, rows) {
  const [kind, mark] = OUTCOMES.get(passed), word = { pass: "kept", fail: "missed", open: "not run" }[kind];
  const deciding = rows.filter((row) => row.decides && row.about === about);
  return el("li", { className: `question is-${kind}` }, el("span", { className: `outcome is-${kind}` }, el("span", { "aria-hidden": "true" }, mark), ` ${word}`),
    el("h3", {}, capital(about)),
    deciding.length ? el("ul", { className: "effects" }, ...deciding.map(effect)) : why ? el("p", {}, why) : null);
}

/** One deciding number: what it is, its size and interval, on what it was measured, and the bound or how it was missed. */
function effect(row) {
  const [kind, mark, word] = OUTCOMES.get(row.passed), interval = intervalOf(row);
  const behind = [interval ? `95 % interval ${interval}` : "", row.n === null ? "" : `n\u00a0=\u00a0${number(row.n)}`, row.split].filter(Boolean).join(" · ");
  return el("li", { className: `is-${kind}` },
    el("p", { className: "effect-name" }, `${row.measure}, ${row.condition}`),
    row.value === null ? null : el("p", {}, el("span", { className: "effect-mark", role: "img", "aria-label": word }, mark),
      el("strong", {}, ` ${number(row.value)}`), el("span", { className: "hint" }, ` ${behind}`)),
    row.note ? el("p", { className: kind === "fail" ? "" : "hint" }, row.note) : null);
}

function intervalOf({ low, high }) {
  return low === null || high === null ? "" : `${number(low)} to ${number(high)}`;
}

function auditTable(body) {
  const head = ["measure", "condition", "value", "interval", "n", "split", "result", "note"];
  const numeric = new Set(["value", "interval", "n"]);
  return el("div", { className: "scroller", tabIndex: 0, role: "region", "aria-label": "Audit table" }, el("table", { className: "audit" },
    el("caption", { className: "hidden" }, "Every measurement of the audit, controls beside claims"),
    el("thead", {}, el("tr", {}, ...head.map((name) => el("th", { scope: "col", className: numeric.has(name) ? "numeric" : "" }, name)))), body));
}

/** Rows under the question that they belong to; a measure is named once for the rows that share it. */
function auditRows(rows) {
  return rows.flatMap((row, index) => {
    const before = rows[index - 1], opens = row.about && (!before || before.about !== row.about);
    const first = opens || !before || before.measure !== row.measure;
    const title = opens ? [el("tr", { className: "about" }, el("th", { scope: "rowgroup", colSpan: 8 }, capital(row.about)))] : [];
    return [...title, auditRow(row, first, first ? spanFrom(rows, index) : 0)];
  });
}

function spanFrom(rows, index) {
  let span = 1;
  while (rows[index + span] && rows[index + span].measure === rows[index].measure && rows[index + span].about === rows[index].about) span++;
  return span;
}

function auditRow(row, first, span) {
  const [kind, mark, word] = row.value === null && row.passed === null ? ["open", "–", "not run"] : OUTCOMES.get(row.passed);
  return el("tr", { className: `${first ? "first" : ""} ${row.decides ? "decides" : ""}` },
    first ? el("th", { scope: "row", rowSpan: span }, row.measure) : null,
    el("td", {}, row.condition), el("td", { className: "numeric strong" }, number(row.value)),
    el("td", { className: "numeric" }, intervalOf(row)), el("td", { className: "numeric" }, row.n === null ? "" : number(row.n)),
    el("td", {}, row.split),
    el("td", {}, el("span", { className: `outcome is-${kind}` }, el("span", { "aria-hidden": "true" }, mark), ` ${word}`),
      row.decides ? el("span", { className: "decider" }, "decides") : null),
    el("td", { className: "note" }, row.note));
}
