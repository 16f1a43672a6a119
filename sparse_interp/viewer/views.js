// Two tabs beside the graph: residual channels with the tokens and positions that write them, and how the circuit was found.

/** One channel at a time, those first that most nodes of the circuit are on. */
function showChannels(view, model, follow) {
  const { channels } = model.data;
  const on = (channel) => model.nodes.filter((node) => onRail(node) && node.channel === channel);
  const sorted = [...channels].sort((a, b) => on(b.channel).length - on(a.channel).length || a.channel - b.channel);
  const chooser = el("select", { id: "channel" }, ...sorted.map(({ channel, n_tokens: tokens }) =>
    el("option", { value: String(channel) }, `channel ${channel} · ${plural(on(channel).length, "node")} · written by ${plural(tokens, "token")}`)));
  const card = el("div", { className: "channel" });
  const show = () => card.replaceChildren(...channelCards(model, channels.find(({ channel }) => String(channel) === chooser.value), on, follow));
  chooser.addEventListener("input", show);
  show();
  view.replaceChildren(el("div", { className: "paper" }, el("h2", {}, "Residual channels"),
    el("p", { className: "lead" }, "Every channel that the circuit reads or writes: which tokens' embeddings and which positions write it, " +
      "and which tokens it decides about at the end."),
    el("p", { className: "chooser" }, el("label", { for: "channel" }, "Channel "), chooser), card));
}

function channelCards(model, channel, on, follow) {
  const nodes = on(channel.channel);
  return [
    section("Embedding", el("p", { className: "hint" }, `Weights from tokens into this channel; ${plural(channel.n_tokens, "token")} of the vocabulary ${channel.n_tokens === 1 ? "has" : "have"} one that is not 0.`),
      channel.histogram ? histogramOf(channel.histogram, "embedding weights") : null, tokenColumns(model, channel.embedding, ["Largest", "Smallest"])),
    section("Unembedding", el("p", { className: "hint" }, "Weights from this channel to the logits of tokens."), tokenColumns(model, channel.unembedding, ["Largest", "Smallest"])),
    channel.positions.length ? curveCard({ title: "Positions", x: "position", y: "weight into this channel", points: channel.positions.map((value, i) => [i, value]), log_x: false })
      : section("Positions", el("p", { className: "none" }, "No position writes this channel.")),
    section("Nodes on it", el("ul", { className: "wires" }, ...nodes.map((node) => linkRow(fullName(node), node.importance, Math.max(1e-9, ...nodes.map((n) => n.importance ?? 0)), () => follow(node))))),
  ].filter(Boolean);
}

/** Settings, scores and the course of the search, and the model that it was in. */
function showOrigin(view, { tables, curves }) {
  view.replaceChildren(el("div", { className: "paper" }, el("h2", {}, "How it was found"),
    el("div", { className: "columns" }, ...tables.map(tableCard), ...curves.map(curveCard).filter(Boolean))));
}
