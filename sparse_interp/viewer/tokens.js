// One CircuitsVis view: unpacks the bundle that is inside this page, and hands it the data.

const text = (id) => document.getElementById(id).textContent;
const view = document.getElementById("view");

/** Columns of the table of top tokens are numbered, and five from the start: give them names, and say how many. */
function nameColumns(names) {
  const rename = () => {
    for (const head of view.querySelectorAll("thead tr:nth-child(2) th")) {
      if (/^\d+$/.test(head.textContent)) head.textContent = names[Number(head.textContent)] ?? "";
    }
    const count = view.querySelector("#visible-cols-selector");
    if (count && !count.dataset.seen) {
      count.dataset.seen = "yes";
      count.value = String(Math.min(5, names.length));
      count.dispatchEvent(new Event("change", { bubbles: true }));
    }
  };
  new MutationObserver(rename).observe(view, { childList: true, subtree: true });
}

async function draw() {
  const packed = Uint8Array.from(atob(text("bundle")), (c) => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = document.createElement("script");
  script.textContent = await new Response(stream).text();
  document.head.append(script);
  const { component, props, columns } = JSON.parse(text("data"));
  if (columns) nameColumns(columns);
  CircuitsVis.render("view", CircuitsVis[component], props);
}

draw().catch((error) => {
  view.className = "failed";
  view.textContent = `This view could not be drawn: ${error}`;
});
