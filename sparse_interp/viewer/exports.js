// What a reader takes away: the drawing as SVG or PNG, nodes and edges as CSV, everything as JSON.

/** Properties that the page's style sheet gives to the drawing, written into each element of a copy. */
const DRAWN = ["fill", "fill-opacity", "stroke", "stroke-width", "stroke-dasharray", "stroke-linecap", "stroke-linejoin", "opacity", "display", "font",
  "text-anchor", "dominant-baseline", "paint-order", "transform"];

function wireExports(buttons, model, stage, text) {
  const name = [model.data.task || "circuit", model.data.model].filter(Boolean).join("-").replace(/[^\w.-]+/g, "_").slice(0, 80);
  const acts = {
    svg: () => save(`${name}.svg`, "image/svg+xml", svgText(stage)),
    png: () => savePicture(`${name}.png`, stage),
    nodes: () => save(`${name}.nodes.csv`, "text/csv", csv(nodeRows(model))),
    edges: () => save(`${name}.edges.csv`, "text/csv", csv(edgeRows(model))),
    json: () => save(`${name}.json`, "application/json", text),
  };
  for (const button of buttons.querySelectorAll("button[data-form]")) button.addEventListener("click", () => acts[button.dataset.form]());
}

function save(name, type, content) {
  const address = URL.createObjectURL(new Blob([content], { type }));
  const link = el("a", { href: address, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(address), 10000);
}

/** The drawing as it stands, with its style in every element, for programs that know no style sheet of ours. */
function svgText(stage) {
  const drawn = stage.querySelector("svg.graph"), copy = drawn.cloneNode(true);
  const originals = [drawn, ...drawn.querySelectorAll("*")], copies = [copy, ...copy.querySelectorAll("*")];
  originals.forEach((element, i) => {
    const style = getComputedStyle(element);
    if (style.display === "none") { copies[i].setAttribute("data-hidden", ""); return; }
    for (const property of DRAWN) copies[i].style.setProperty(property, style.getPropertyValue(property));
    for (const attribute of ["tabindex", "role", "aria-pressed"]) copies[i].removeAttribute(attribute);
  });
  copy.querySelectorAll("[data-hidden]").forEach((element) => element.remove());
  const { width, height } = drawn.getBoundingClientRect();
  for (const [key, value] of Object.entries({ xmlns: "http://www.w3.org/2000/svg", width, height, viewBox: `0 0 ${width} ${height}` })) copy.setAttribute(key, value);
  const ground = document.createElementNS("http://www.w3.org/2000/svg", "rect");
  for (const [key, value] of Object.entries({ width, height, fill: getComputedStyle(stage).backgroundColor })) ground.setAttribute(key, value);
  copy.prepend(ground);
  return new XMLSerializer().serializeToString(copy);
}

/** The same at twice the size, through a canvas that never leaves the page. */
function savePicture(name, stage) {
  const picture = new Image(), { width, height } = stage.getBoundingClientRect();
  picture.onload = () => {
    const canvas = el("canvas", { width: Math.round(2 * width), height: Math.round(2 * height) });
    canvas.getContext("2d").drawImage(picture, 0, 0, canvas.width, canvas.height);
    canvas.toBlob((blob) => save(name, "image/png", blob));
  };
  picture.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(svgText(stage))}`;
}

function nodeRows(model) {
  const head = ["id", "layer", "site", "channel", "head", "importance", "baseline", "kl_without", "lead_without", "accuracy_without", "loss_without"];
  return [head, ...model.nodes.map((node) => [node.id, node.layer, node.site, node.channel, node.head, node.importance, node.baseline,
    ...["kl", "lead", "accuracy", "loss"].map((key) => (node.knock_out ? node.knock_out[key] : null))])];
}

/** Edges as they are drawn: what the thresholds leave out is left out here too. */
function edgeRows(model) {
  return [["source", "target", "kind", "weight"], ...model.edges.filter((edge) => !edge.off).map((edge) => [edge.source, edge.target, edge.kind, isWeight(edge) ? edge.weight : null])];
}

/** Cells that begin like a formula are quoted with a leading ', as spreadsheets ask for; numbers stay numbers. */
function csv(rows) {
  const cell = (value) => {
    if (value === null || value === undefined) return "";
    if (typeof value === "number") return String(value);
    const text = /^[=+\-@\t\r]/.test(value) ? `'${value}` : value;
    return /[",\r\n]/.test(text) ? `"${text.replace(/"/g, '""')}"` : text;
  };
  return `${rows.map((row) => row.map(cell).join(",")).join("\r\n")}\r\n`;
}
