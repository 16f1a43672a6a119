// Small tables, curves and histograms, for whatever the payload brings as such.

function section(title, ...children) {
  return el("section", { className: "card" }, el("h3", {}, title), ...children);
}

/** A table of the payload; columns that hold numbers alone are set to the right. */
function tableOf({ title, columns, rows, note }) {
  const numeric = columns.map((_, i) => rows.some((row) => row[i] !== null) && rows.every((row) => row[i] === null || typeof row[i] === "number"));
  const align = (i) => (numeric[i] ? "numeric" : "");
  return el("div", { className: "scroller", tabIndex: 0, role: "region", "aria-label": title },
    el("table", { className: "small-table" }, el("caption", { className: "hidden" }, note ? `${title}. ${note}` : title),
      el("thead", {}, el("tr", {}, ...columns.map((name, i) => el("th", { scope: "col", className: align(i) }, name)))),
      el("tbody", {}, ...rows.map((row) => el("tr", {}, ...row.map((cell, i) => el("td", { className: align(i) }, cell === null ? "–" : number(cell))))))));
}

/** The same under its title, with the note in sight. */
function tableCard(table) {
  return section(table.title, table.note ? el("p", { className: "hint" }, table.note) : null,
    table.rows.length ? tableOf(table) : el("p", { className: "none" }, "none"));
}

const CHART = { width: 460, height: 200, left: 62, right: 14, top: 12, bottom: 40 };

/** A line through points, with its axes; the numbers behind it are a table below. */
function curveCard(curve) {
  const points = curve.points.filter(([x, y]) => x !== null && y !== null && (!curve.log_x || x > 0));
  if (points.length < 2) return null;
  const across = (x) => (curve.log_x ? Math.log10(x) : x);
  const range = (values) => { const low = Math.min(...values), high = Math.max(...values); return high > low ? [low, high] : [low - 1, high + 1]; };
  const [xs, ys] = [range(points.map(([x]) => across(x))), range(points.map(([, y]) => y))];
  const inner = { width: CHART.width - CHART.left - CHART.right, height: CHART.height - CHART.top - CHART.bottom };
  const place = ([x, y]) => [CHART.left + inner.width * (across(x) - xs[0]) / (xs[1] - xs[0]), CHART.top + inner.height * (1 - (y - ys[0]) / (ys[1] - ys[0]))];
  const holder = el("div", {});
  const svg = d3.select(holder).append("svg").attr("class", "chart").attr("viewBox", `0 0 ${CHART.width} ${CHART.height}`)
    .attr("role", "img").attr("aria-label", `${curve.title}: ${curve.y} from ${number(points[0][1])} to ${number(points.at(-1)[1])}`);
  const bottom = CHART.top + inner.height, right = CHART.left + inner.width;
  svg.append("path").attr("class", "axis").attr("d", `M${CHART.left},${CHART.top}V${bottom}H${right}`);
  const label = (x, y, anchor, text) => svg.append("text").attr("x", x).attr("y", y).attr("text-anchor", anchor).text(text);
  const back = (value) => (curve.log_x ? 10 ** value : value);
  label(CHART.left - 6, CHART.top + 8, "end", number(ys[1]));
  label(CHART.left - 6, bottom, "end", number(ys[0]));
  label(CHART.left, bottom + 16, "start", number(back(xs[0])));
  label(right, bottom + 16, "end", number(back(xs[1])));
  label((CHART.left + right) / 2, bottom + 32, "middle", `${curve.x}${curve.log_x ? ", by factors" : ""} → ${curve.y}`);
  svg.append("path").attr("class", "line").attr("d", `M${points.map((point) => place(point).map((v) => v.toFixed(1)).join(",")).join("L")}`);
  const rows = el("details", {}, el("summary", {}, "Numbers"), tableOf({ title: curve.title, columns: [curve.x, curve.y], rows: points, note: "" }));
  return section(curve.title, holder, rows);
}

/** Bars whose height is the logarithm of a count: one token in ten thousand is still seen. */
function histogramOf(histogram, what) {
  const { low, high, counts } = histogram, width = 360, height = 54;
  const tallest = Math.log1p(Math.max(...counts));
  const holder = el("div", { className: "histogram" });
  const svg = d3.select(holder).append("svg").attr("viewBox", `0 0 ${width} ${height + 14}`).attr("role", "img")
    .attr("aria-label", `Distribution of ${what}: from ${number(low, true)} to ${number(high, true)}, ${plural(counts.reduce((a, b) => a + b, 0), "token")}`);
  const each = width / counts.length;
  counts.forEach((count, i) => {
    const tall = height * Math.log1p(count) / tallest, middle = low + (i + 0.5) * (high - low) / counts.length;
    svg.append("rect").attr("class", middle < 0 ? "negative" : "positive").attr("x", i * each + 0.5).attr("width", each - 1)
      .attr("y", height - tall).attr("height", tall).append("title").text(`${number(middle, true)}: ${plural(count, "token")}`);
  });
  const label = (x, anchor, text) => svg.append("text").attr("x", x).attr("y", height + 12).attr("text-anchor", anchor).text(text);
  label(0, "start", number(low, true));
  label(width, "end", number(high, true));
  holder.title = "Bars are as tall as the logarithm of their count";
  if (low < 0 && high > 0) label(width * -low / (high - low), "middle", "0");
  return holder;
}

/** Promoted on one side, suppressed on the other, strongest first; `writes` are pairs of text and effect. */
function tokenColumns(model, writes, [above, below]) {
  const sorted = [...writes].sort((a, b) => Math.abs(b[1]) - Math.abs(a[1]));
  const largest = Math.max(1e-9, ...sorted.map(([, effect]) => Math.abs(effect)));
  const column = (title, kept, sign) => el("div", { className: `writes ${sign}` }, el("h4", {}, title),
    kept.length === 0 ? el("p", { className: "none" }, "none") : el("ul", {}, ...kept.map(([token, effect]) =>
      el("li", {}, el("code", {}, tokenName(model.text(token))), meter(Math.abs(effect) / largest), el("span", { className: "value" }, number(effect, true))))));
  return el("div", { className: "two" }, column(above, sorted.filter((write) => write[1] > 0), "positive"),
    column(below, sorted.filter((write) => write[1] < 0), "negative"));
}

function meter(share) {
  const bar = el("span", { className: "meter", "aria-hidden": "true" }, el("i"));
  bar.firstChild.style.setProperty("--share", clamp(share, 0.02, 1).toFixed(3));
  return bar;
}
