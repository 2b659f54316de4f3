// Charts that a reader moves with a slider: figures that msif_lib/study/charts.py has written.
// Vega is loaded from vendor/, beside this file, on the pages that need it and nowhere else.
(() => {
  "use strict";

  const HERE = document.currentScript.src;
  const VEGA = ["vega.min.js", "vega-lite.min.js", "vega-embed.min.js"];
  const loaded = new Map();

  /** Run a script of vendor/, once; scripts asked for together run in that order. */
  function load(...names) {
    for (const name of names.filter((one) => !loaded.has(one))) {
      const script = document.createElement("script");
      const done = new Promise((resolve, reject) => {
        script.onload = resolve;
        script.onerror = () => reject(new Error(`${name} could not be loaded`));
      });
      script.async = false;
      script.src = new URL(`vendor/${name}`, HERE);
      document.head.append(script);
      loaded.set(name, done);
    }
    return Promise.all(names.map((name) => loaded.get(name)));
  }

  // Colours are those of charts.css, so that they follow the page's theme by themselves.
  const CONFIG = {
    aria: false,
    background: "transparent",
    axis: {
      domainColor: "var(--chart-line)",
      gridColor: "var(--chart-grid)",
      labelColor: "var(--chart-ink)",
      labelFontSize: 12.5,
      labelFlush: false,
      labelOverlap: "greedy",
      tickColor: "var(--chart-line)",
      titleColor: "var(--chart-ink)",
      titleFontSize: 13,
      titleFontWeight: "normal",
    },
    legend: {
      labelColor: "var(--chart-ink)",
      labelFontSize: 12.5,
      labelLimit: 400,
      orient: "top",
      titleColor: "var(--chart-ink)",
      titleFontSize: 13,
    },
    mark: { color: "var(--chart-1)" },
    padding: { bottom: 5, left: 2, right: 16, top: 5 }, // half a label stands out at the right
    range: { category: [1, 2, 3, 4].map((n) => `var(--chart-${n})`) },
    rule: { color: "var(--chart-quiet)" },
    text: { color: "var(--chart-ink)", fontSize: 12.5 },
    title: { anchor: "start", color: "var(--chart-ink)", fontSize: 14 },
    view: { stroke: null },
  };

  /** Draw a Vega-Lite specification in an element, in the page's colours; its view. */
  async function draw(element, spec) {
    await load(...VEGA);
    const frame = document.createElement("div");
    frame.className = "msif-drawn";
    frame.ariaHidden = "true"; // a screen reader gets the element's own name, not each mark
    element.replaceChildren(frame);
    const config = { ...CONFIG, font: getComputedStyle(element).fontFamily };
    const options = { actions: false, config, renderer: "svg", tooltip: false };
    return (await vegaEmbed(frame, spec, options)).view;
  }

  async function start(chart) {
    const live = chart.querySelector(".live");
    const { specs, positions, sentences } = JSON.parse(
      chart.querySelector("script[type='application/json']").textContent,
    );
    const slider = chart.querySelector("input");
    const panels = [...chart.querySelectorAll(".panel")];
    live.hidden = false; // a panel that is hidden has no width to draw in
    const views = await Promise.all(panels.map((panel, n) => draw(panel, specs[n]))).catch((error) => {
      live.hidden = true;
      throw error;
    });

    function move() {
      const place = slider.valueAsNumber;
      slider.setAttribute("aria-valuetext", positions[place]);
      chart.querySelector("output").textContent = positions[place];
      chart.querySelector(".says").textContent = sentences[place];
      return Promise.all(views.map((view) => view.signal("place", place).runAsync()));
    }

    chart.querySelector(".without").hidden = true;
    slider.addEventListener("input", move);
    await move();
  }

  /** All charts of the page, drawn; what fails leaves its table where it stands. */
  const ready = new Promise((resolve) => {
    document.addEventListener("DOMContentLoaded", () => {
      resolve(Promise.allSettled([...document.querySelectorAll(".msif-chart")].map(start)));
    });
  });

  window.msif = { draw, load, ready };
})();
