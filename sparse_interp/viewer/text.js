// Words, numbers and elements. Every string of the payload reaches the page through `el` or `svgText`,
// as a text node; nothing here or elsewhere parses markup.

const SITE_NAMES = {
  attn_read: "attention read", q: "query", k: "key", v: "value", attn_write: "attention write",
  mlp_read: "MLP read", neuron: "neuron", mlp_write: "MLP write", final_read: "final read",
};

/** An element with properties (or `aria-`, `data-`, `role` attributes) and children; strings become text nodes. */
function el(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined) continue;
    if (name.includes("-") || ["role", "scope", "for"].includes(name)) element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

/** A number with a real minus sign and about three digits. */
function number(value, signed = false) {
  if (value === null || value === undefined) return "–";
  if (typeof value !== "number") return String(value);
  const size = Math.abs(value);
  let text = size === 0 ? "0" : size >= 1e5 || size < 1e-3 ? size.toExponential(1) : String(Number(size.toPrecision(3)));
  if (size >= 1000 && size < 1e5) text = Math.round(size).toLocaleString("en-US");
  return (value < 0 ? "−" : signed && value > 0 ? "+" : "") + text;
}

/** A token's text with whatever is invisible made visible, so that no token is drawn as nothing. */
function visible(piece, limit = 48) {
  const shown = piece
    .replace(/\n/g, "↵").replace(/\r/g, "␍").replace(/\t/g, "⇥")
    .replace(/[\u0000-\u001f\u007f-\u009f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff]/g, (c) => `\\u${c.charCodeAt(0).toString(16).padStart(4, "0")}`);
  const characters = Array.from(shown);
  return characters.length > limit ? characters.slice(0, limit - 1).join("") + "…" : shown;
}

/** A token on its own: its spaces are marked, because a leading space makes another token. */
function tokenName(piece, limit = 24) {
  return piece === "" ? "(empty)" : visible(piece, limit).replace(/ /g, "␣");
}

function isToken(vertex) {
  return vertex.side !== undefined;
}

/** The name that panels and screen readers use: "L0 head 3 · query 51". */
function fullName(vertex) {
  if (isToken(vertex)) {
    const role = vertex.role ? ` (${vertex.role})` : "";
    return `${vertex.side === "embedding" ? "reads token" : "writes token"} ${tokenName(vertex.piece)}${role}`;
  }
  if (vertex.site === "final_read") return `Final read · channel ${vertex.channel}`;
  const head = vertex.head === null ? "" : ` head ${vertex.head}`;
  const rail = onRail(vertex) ? " · channel" : head ? " ·" : "";
  return head
    ? `L${vertex.layer}${head} · ${SITE_NAMES[vertex.site]} ${vertex.channel}`
    : `L${vertex.layer} ${SITE_NAMES[vertex.site]}${rail} ${vertex.channel}`;
}

/** The few characters that fit beside a node in the graph. */
function shortName(vertex) {
  if (isToken(vertex)) return tokenName(vertex.piece, 14);
  return String(vertex.channel);
}

/** Reads and writes touch the residual stream: their channel is a rail. */
function onRail(vertex) {
  return /_(read|write)$/.test(vertex.site || "");
}

function plural(count, noun) {
  return `${count.toLocaleString("en-US")} ${noun}${count === 1 ? "" : "s"}`;
}
