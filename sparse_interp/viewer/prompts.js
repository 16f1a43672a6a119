// The task's prompts with a number at every token: each prompt above its twin, token above token, the answer at the end.

/** The prompts alone, or with numbers: `layers` are ways to look, each {name, values, note}, with values pair by pair. */
function promptsCard(model, title, layers) {
  const prompts = model.data.prompts;
  if (prompts.length === 0) return null;
  const usable = layers.filter((layer) => layer && layer.values && layer.values.length === prompts.length);
  const list = el("ol", { className: "prompts" }), note = el("p", { className: "hint" });
  const show = (layer) => {
    note.textContent = layer ? layer.note : "";
    list.replaceChildren(...pairRows(model, layer));
  };
  const card = section(title, usable.length > 1 ? choiceOf("What is shown", usable.map((layer) => layer.name), (i) => show(usable[i])) : null, note, list);
  if (usable.length) card.querySelector("h3").append(numbersToggle(list));
  show(usable[0]);
  return card;
}

/** Buttons of which one is pressed. */
function choiceOf(label, names, choose) {
  const buttons = names.map((name, i) => el("button", { type: "button", className: "quiet small", "aria-pressed": String(i === 0) }, name));
  buttons.forEach((button, i) => button.addEventListener("click", () => {
    buttons.forEach((other) => other.setAttribute("aria-pressed", String(other === button)));
    choose(i);
  }));
  return el("div", { className: "choice", role: "group", "aria-label": label }, ...buttons);
}

function numbersToggle(list) {
  const toggle = el("button", { type: "button", className: "quiet small numbers-toggle", "aria-pressed": "false" }, "Show numbers");
  toggle.addEventListener("click", () => toggle.setAttribute("aria-pressed", String(list.classList.toggle("numbered"))));
  return toggle;
}

function pairRows(model, layer) {
  const values = layer ? layer.values : model.data.prompts.map(() => [null, null]);
  const largest = Math.max(1e-9, ...values.flat(2).map((value) => Math.abs(value ?? 0)));
  return model.data.prompts.map((prompt, i) => pairRow(model, prompt, values[i], largest));
}

/** Token above token: pairs are aligned from the left, as far as both go. */
function pairRow(model, prompt, [ours, theirs], largest) {
  const cells = [], length = Math.max(prompt.pieces.length, prompt.twin.length);
  const edges = [extremes(ours), extremes(theirs)];
  for (let i = 0; i < length; i++) {
    const differs = prompt.twin.length > 0 && prompt.pieces[i] !== prompt.twin[i];
    const sides = [tokenCell(model, prompt.pieces[i], ours && ours[i], largest, edges[0].get(i))];
    if (prompt.twin.length) sides.push(tokenCell(model, prompt.twin[i], theirs && theirs[i], largest, edges[1].get(i)));
    cells.push(el("span", { className: differs ? "aligned differs" : "aligned" }, ...sides));
    const newline = [prompt.pieces[i], prompt.twin[i]].some((piece) => piece !== undefined && /\n$/.test(model.text(piece)));
    if (newline) cells.push(el("span", { className: "line-end" }));
  }
  const last = el("span", { className: "aligned answers" }, answerCell("answer", prompt.answer, prompt.foil),
    prompt.twin.length ? answerCell("foil", prompt.foil, prompt.answer) : null);
  return el("li", { className: "pair" }, el("p", { className: "snippet" }, ...cells, last));
}

function answerCell(kind, next, other) {
  return el("span", {}, el("span", { className: `next ${kind}` }, tokenName(next)), el("span", { className: "against" }, `not ${tokenName(other)}`));
}

function tokenCell(model, piece, value, largest, edge) {
  if (piece === undefined) return el("span", { className: "piece" }, "\u00a0");
  return shadedPiece(model.text(piece), value, largest, edge);
}

/** A token shaded by a number: colour and a line below for the sign, and the number for whoever asks. */
function shadedPiece(text, value, largest, mark) {
  const shaded = el("span", { className: "piece" }, visible(text));
  if (mark) shaded.classList.add(mark);
  if (value === null || value === undefined) return shaded;
  shaded.title = number(value, true);
  if (value === 0) return shaded;
  shaded.classList.add(value < 0 ? "negative" : "positive");
  shaded.style.setProperty("--share", Math.min(1, Math.abs(value) / largest).toFixed(3));
  shaded.append(el("span", { className: "figure" }, number(value, true)));
  return shaded;
}

/** Where the largest and the smallest value stand, if they stand out: by a fifth of the spread from the next one. */
function extremes(values) {
  const marks = new Map();
  if (!values || values.length < 3) return marks;
  const order = values.map((value, i) => [value ?? 0, i]).sort((a, b) => a[0] - b[0]);
  const average = order.reduce((sum, [value]) => sum + value, 0) / order.length;
  const spread = Math.sqrt(order.reduce((sum, [value]) => sum + (value - average) ** 2, 0) / order.length);
  if (order.at(-1)[0] - order.at(-2)[0] > 0.2 * spread) marks.set(order.at(-1)[1], "at");
  if (order[1][0] - order[0][0] > 0.2 * spread) marks.set(order[0][1], "least");
  return marks;
}

/** Values less those of the twin, at tokens that both have, for both lines. */
function differences(values) {
  return values.map(([ours, theirs]) => {
    const less = (a, b) => a.map((value, i) => (i < b.length ? (value ?? 0) - (b[i] ?? 0) : null));
    return [less(ours, theirs), less(theirs, ours)];
  });
}
