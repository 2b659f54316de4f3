// What the explorers share: numbers in words, images to choose from, and charts.
const number = (value) => {
  const size = Math.abs(value);
  const text = size && size < 1e-3 ? size.toExponential(1) : String(Number(size.toPrecision(2)));
  return (value < 0 ? "−" : "") + text.replace("e-", "e−");
};
const signed = (value) => (value > 0 ? "+" : "") + number(value);
const sentence = (text) => text[0].toUpperCase() + text.slice(1);
const sum = (list) => list.reduce((total, value) => total + value, 0);

const make = (tag, attributes, ...children) => {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
};

// A radio button for each image, by which it is chosen with the pointer or with the arrow keys.
let groups = 0;
const picker = (fieldset, images, names, choose) => {
  const group = `msif-${Date.now()}-${(groups += 1)}`;
  return images.map((image, k) => {
    const input = make("input", { type: "radio", name: group, "aria-label": names[k] });
    const tile = make("span", { class: "tile", title: names[k] });
    tile.append(image ? make("img", { src: image, alt: "" }) : "all");
    input.addEventListener("change", () => choose(k));
    fieldset.append(make("label", {}, input, tile));
    return { input, tile };
  });
};

// A chart of Vega-Lite. `choose` is called with `i` of the row that was clicked; what is returned gives
// the chart other rows and another name for screen readers.
const drawn = [];
const chart = (node, spec, choose) => {
  const click = (_, item) => item?.datum?.i >= 0 && choose(item.datum.i);
  let view;
  node.setAttribute("role", "img");
  return async (rows, label) => {
    node.setAttribute("aria-label", label);
    if (view) return (await view).data("rows", rows).runAsync();
    view = msif.draw(node, {
      width: "container",
      height: 230,
      autosize: { type: "fit", contains: "padding", resize: true },
      data: { name: "rows", values: rows },
      ...spec,
    });
    drawn.push(view);
    if (choose) (await view).addEventListener("click", click);
  };
};

const axis = (field, title, more = {}) => ({
  field,
  title,
  type: "quantitative",
  axis: { grid: false, tickCount: 5, minExtent: 18, labelFlush: false },
  ...more,
});
const color = (name) => `var(--chart-${name})`;

// Lines of kinds `true` and `predicted`, and the place on them where the reader is.
const lines = (x, more) => ({
  encoding: {
    x: axis("x", x, more),
    y: axis("y", "change of the loss"),
  },
  layer: [
    {
      mark: { type: "line", stroke: color(1) },
      transform: [{ filter: "!datum.here" }],
      encoding: {
        strokeDash: {
          field: "kind",
          title: null,
          scale: { domain: ["true", "predicted"], range: [[1, 0], [5, 4]] }, // prettier-ignore
          legend: { symbolType: "stroke", symbolSize: 400 },
        },
      },
    },
    { mark: { type: "circle", size: 90, color: color(1) }, transform: [{ filter: "datum.here" }] },
  ],
});

// True against predicted change. A point may have a picture, a place that it came from, and a ring.
const kind = (name) => ({ filter: `datum.kind === "${name}"` });
const agreement = {
  encoding: { x: axis("x", "predicted change of the loss"), y: axis("y", "true change") },
  layer: [
    { mark: { type: "line", stroke: color("quiet"), strokeDash: [5, 4] }, transform: [kind("equal")] },
    {
      mark: { type: "rule", stroke: color(1), opacity: 0.5 },
      transform: [{ filter: "isValid(datum.from)" }],
      encoding: { y2: { field: "from" } },
    },
    {
      mark: { type: "circle", size: 70, color: color(1), opacity: 0.7, cursor: "pointer" },
      transform: [kind("point")],
    },
    {
      mark: { type: "image", width: 18, height: 18, cursor: "pointer" },
      transform: [kind("picture")],
      encoding: { url: { field: "url", type: "nominal" } },
    },
    {
      mark: { type: "point", size: 320, stroke: color("ink"), strokeWidth: 2.5 },
      transform: [{ filter: "datum.chosen" }],
    },
  ],
};
// The line on which both are equal, as far as the points reach.
const equality = (points) => {
  const xs = points.map(({ x }) => x);
  return [Math.min(0, ...xs), Math.max(0, ...xs)].map((x) => ({ kind: "equal", x, y: x }));
};

// Start the explorers of one name; where charts cannot be drawn the table stays.
const explore = (name, start) => {
  if (!window.msif) return;
  document.querySelectorAll(`.msif-explorer.${name}:not([data-started])`).forEach((root) => {
    const swap = (live) => {
      root.querySelector(".static").hidden = live;
      root.querySelector(".live").hidden = !live;
    };
    root.dataset.started = "";
    swap(true);
    start(root, JSON.parse(root.querySelector('script[type="application/json"]').textContent));
    Promise.all(drawn).catch(() => swap(false));
  });
};
