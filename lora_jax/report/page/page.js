"use strict";
// Draws each chart when it is near the screen, in the colours of the page, and sorts tables.

const specs = JSON.parse(document.getElementById("charts").textContent);
const places = [...document.querySelectorAll(".chart")];
const views = new Map(); // of the charts that are drawn

function config(width) {
  const style = getComputedStyle(document.documentElement);
  const colour = (name) => style.getPropertyValue(name).trim();
  const colours = (name) => colour(name).split(",").map((one) => one.trim());
  const ramp = colours("--ramp");
  const [ink, soft, line] = [colour("--ink"), colour("--soft"), colour("--line")];
  return {
    background: null,
    font: colour("--sans"),
    axis: {
      labelColor: soft, titleColor: soft, gridColor: line, domainColor: line, tickColor: line,
      titleFontWeight: 500, labelFontSize: 11, titleFontSize: 12, labelSeparation: 8,
    },
    legend: {
      labelColor: ink, titleColor: soft, titleFontWeight: 500, labelFontSize: 12, orient: "top",
      columns: Math.max(1, Math.floor(width / 190)), labelLimit: 170, titleLimit: width - 40,
      gradientLength: Math.min(200, width - 40), symbolOpacity: 1,
    },
    range: {
      category: [1, 2, 3, 4, 5, 6, 7, 8].map((i) => colour(`--c${i}`)),
      ramp, heatmap: ramp, ordinal: colours("--steps"),
    },
    view: { stroke: null },
    mark: { color: colour("--c1") },
    text: { color: ink },
    style: {
      ground: { stroke: colour("--panel"), strokeWidth: 4, strokeJoin: "round" },
      text: { fill: ink },
    },
    rule: { color: colour("--c2") },
    line: { strokeWidth: 2 },
  };
}

async function draw(place) {
  views.get(place)?.finalize();
  views.set(place, null);
  try {
    const drawn = await vegaEmbed(place, structuredClone(specs[places.indexOf(place)]), {
      actions: false, ast: true, renderer: "svg", config: config(place.clientWidth),
    });
    views.set(place, drawn);
  } catch (error) {
    place.textContent = `This chart cannot be drawn: ${error.message}`;
    place.classList.add("failed");
    console.error(error);
  }
}

function value(row, column) {
  const text = row.cells[column].dataset.value;
  return text === undefined || text === "" ? null : text;
}

function sort(table, column) {
  const heads = [...table.tHead.rows[0].cells];
  const up = heads[column].getAttribute("aria-sort") !== "ascending";
  for (const head of heads) head.removeAttribute("aria-sort");
  heads[column].setAttribute("aria-sort", up ? "ascending" : "descending");
  const rows = [...table.tBodies[0].rows];
  const numbers = rows.every((row) => value(row, column) === null || !isNaN(value(row, column)));
  rows.sort((one, other) => {
    const [a, b] = [value(one, column), value(other, column)];
    if (a === null || b === null) return (a === null) - (b === null);
    const order = numbers ? a - b : a < b ? -1 : a > b ? 1 : 0;
    return up ? order : -order;
  });
  table.tBodies[0].append(...rows);
}

for (const table of document.querySelectorAll("table.sorts")) {
  table.tHead.addEventListener("click", (event) => {
    const head = event.target.closest("button")?.parentElement;
    if (head) sort(table, head.cellIndex);
  });
}
const observer = new IntersectionObserver((entries) => {
  for (const { isIntersecting, target } of entries) {
    if (isIntersecting && !views.has(target)) draw(target);
  }
}, { rootMargin: "400px" });
for (const place of places) observer.observe(place);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  for (const place of views.keys()) draw(place);
});
addEventListener("beforeprint", () => {
  for (const place of places) if (!views.has(place)) draw(place);
});
