(() => {
  "use strict";
  const SHOWN = 6; // pretraining images at either end
  const BOX = { left: 62, right: 350, top: 10, bottom: 252 }; // of the plot, in its own units
  const NEAR = 30; // how far the pointer may be from a point

  const number = (value) => {
    const size = Math.abs(value);
    const text = size && size < 1e-3 ? size.toExponential(1) : String(Number(size.toPrecision(2)));
    return (value < 0 ? "−" : "") + text.replace("e-", "e−");
  };
  const signed = (value) => (value > 0 ? "+" : "") + number(value);
  const sentence = (text) => text[0].toUpperCase() + text.slice(1);

  const make = (tag, attributes = {}, text = "") => {
    const svg = ["circle", "line", "text"].includes(tag);
    const node = svg
      ? document.createElementNS("http://www.w3.org/2000/svg", tag)
      : document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    if (text) node.textContent = text;
    return node;
  };

  // Round numbers between low and high, about four of them.
  const ticks = (low, high) => {
    const rough = (high - low) / 4;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].find((factor) => factor * power >= rough) * power;
    const found = [];
    for (let k = Math.ceil(low / step); k * step <= high; k += 1) found.push(k * step);
    return found;
  };

  const start = (root, number_of_root) => {
    const values = JSON.parse(root.querySelector('script[type="application/json"]').textContent);
    const part = (selector) => root.querySelector(selector);
    const { pretrain, test } = values;
    const m = pretrain.digits.length;
    const count = test.digits.length;
    const svg = part("svg");
    // row: 0 for all test images together, else one more than the test image.
    const state = { method: values.methods[0], row: 0, point: 0 };
    let order = []; // of the points, by predicted change
    let places = [];

    const score = (i) => values.scores[state.method.key][state.row][i];
    const predicted = (i) => -score(i) / m;
    const change = (i) => values.changes[state.method.truth][state.row][i];
    const named = (i) => `pretraining image ${i}, a ${pretrain.digits[i]}`;
    const told = (i) =>
      `score ${number(score(i))}, predicted change ${signed(predicted(i))}, ` +
      `true change ${signed(change(i))}`;
    const taken = (t) => test.taken[state.method.truth][t];
    const asked = (t) =>
      `test image ${t}, a ${test.digits[t]}` +
      (taken(t) === test.digits[t] ? "" : `, taken for a ${taken(t)}`);

    const radio = (group, value, checked, choose) => {
      const input = make("input", { type: "radio", name: `msif-${group}-${number_of_root}`, value });
      input.checked = checked;
      input.addEventListener("change", choose);
      return input;
    };

    values.methods.forEach((method, position) => {
      const label = make("label");
      const choose = () => {
        state.method = method;
        show();
      };
      label.append(radio("method", method.key, position === 0, choose), method.label);
      part(".methods").append(label);
    });

    const tiles = [];
    for (let row = 0; row <= count; row += 1) {
      const label = make("label");
      const choose = () => {
        state.row = row;
        show();
      };
      const tile = make("span", { class: "tile" });
      const input = radio("test", row, row === 0, choose);
      if (row) tile.append(make("img", { src: test.images[row - 1] }));
      else tile.textContent = "all";
      label.append(input, tile);
      tiles.push({ input, tile });
      part(".tests").append(label);
    }

    const dots = pretrain.digits.map((_, i) => {
      const dot = make("circle", { class: "dot", r: 4, role: "option", tabindex: -1 });
      dot.addEventListener("focus", () => point(i));
      return dot;
    });
    const frame = []; // axes, which change with the values
    const ring = make("circle", { class: "ring", r: 8, cx: 0, cy: 0 });
    svg.append(...dots, ring);

    const draw = () => {
      frame.splice(0).forEach((node) => node.remove());
      const xs = pretrain.digits.map((_, i) => predicted(i));
      const ys = pretrain.digits.map((_, i) => change(i));
      const scale = (list, from, to) => {
        const [low, high] = [Math.min(0, ...list), Math.max(0, ...list)];
        const margin = 0.06 * (high - low) || 1;
        const unit = (to - from) / (high - low + 2 * margin);
        const place = (value) => from + (value - low + margin) * unit;
        return { low: low - margin, high: high + margin, place };
      };
      const x = scale(xs, BOX.left, BOX.right);
      const y = scale(ys, BOX.bottom, BOX.top);
      const line = (kind, x1, y1, x2, y2) =>
        frame.push(make("line", { class: kind, x1, y1, x2, y2 }));
      const word = (text, place) => frame.push(make("text", place, text));
      line("axis", BOX.left, y.place(0), BOX.right, y.place(0));
      line("axis", x.place(0), BOX.bottom, x.place(0), BOX.top);
      ticks(x.low, x.high).forEach((value) => {
        line("axis", x.place(value), BOX.bottom, x.place(value), BOX.bottom + 4);
        const place = { x: x.place(value), y: BOX.bottom + 18, "text-anchor": "middle" };
        word(number(value), place);
      });
      ticks(y.low, y.high).forEach((value) => {
        line("axis", BOX.left - 4, y.place(value), BOX.left, y.place(value));
        word(number(value), { x: BOX.left - 7, y: y.place(value) + 4, "text-anchor": "end" });
      });
      word("predicted change, −I/m", { x: BOX.left, y: 290 });
      const turned = `translate(11 ${BOX.bottom}) rotate(-90)`;
      word("true change", { transform: turned });
      // The identity's scores have no scale of their own, so that equality means nothing there.
      if (state.method.key !== "identity") {
        const [low, high] = [Math.max(x.low, y.low), Math.min(x.high, y.high)];
        line("equality", x.place(low), y.place(low), x.place(high), y.place(high));
      }
      svg.prepend(...frame);
      places = dots.map((dot, i) => {
        const [cx, cy] = [x.place(xs[i]), y.place(ys[i])];
        dot.setAttribute("cx", cx);
        dot.setAttribute("cy", cy);
        dot.setAttribute("aria-label", `${named(i)}: ${told(i)}`);
        return [cx, cy];
      });
      order = dots.map((_, i) => i).sort((a, b) => xs[a] - xs[b] || a - b);
    };

    const card = (i) => {
      const button = make("button", { type: "button", "data-point": i });
      button.append(
        make("img", { src: pretrain.images[i], alt: named(i) }),
        make("span", {}, `a ${pretrain.digits[i]}, I = ${number(score(i))}`),
        make("span", {}, `predicted ${signed(predicted(i))}`),
        make("span", {}, `true ${signed(change(i))}`),
      );
      button.addEventListener("click", () => point(i));
      const item = make("li");
      item.append(button);
      return item;
    };

    // Point at one pretraining image: in the plot, below it, and among the images at the ends.
    const point = (i) => {
      dots[state.point].setAttribute("tabindex", -1);
      dots[state.point].setAttribute("aria-selected", false);
      state.point = i;
      dots[i].setAttribute("tabindex", 0);
      dots[i].setAttribute("aria-selected", true);
      ring.setAttribute("cx", places[i][0]);
      ring.setAttribute("cy", places[i][1]);
      part(".point img").src = pretrain.images[i];
      part(".point p").textContent = sentence(`${named(i)}: ${told(i)}.`);
      root.querySelectorAll("button").forEach((button) => {
        button.setAttribute("aria-pressed", Number(button.dataset.point) === i);
      });
    };

    const show = () => {
      root.dataset.method = state.method.key;
      tiles.forEach(({ input, tile }, row) => {
        input.setAttribute("aria-label", row ? asked(row - 1) : `all ${count} test images`);
        if (!row) return;
        tile.firstChild.alt = "";
        tile.classList.toggle("wrong", taken(row - 1) !== test.digits[row - 1]);
        tile.title = asked(row - 1);
      });
      draw();
      part(".helped").replaceChildren(...order.slice(-SHOWN).reverse().map(card));
      part(".hurt").replaceChildren(...order.slice(0, SHOWN).map(card));
      const r = values.agreement[state.method.key][state.row];
      const which = state.row ? asked(state.row - 1) : `all ${count} test images together`;
      const correlation =
        r === null
          ? "one of the two does not vary"
          : `predicted and true change correlate with r = ${r.toFixed(3).replace("-", "−")}`;
      part(".status").textContent = sentence(
        `${which}; ${state.method.label}. Over the ${m} pretraining images ${correlation}.`,
      );
      point(state.point);
    };

    svg.setAttribute("aria-label", "Pretraining images by predicted and true change of the loss");
    svg.addEventListener("keydown", (event) => {
      const here = order.indexOf(state.point);
      const steps = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1 };
      const there = { Home: 0, End: m - 1 }[event.key] ?? here + steps[event.key];
      if (Number.isNaN(there)) return;
      event.preventDefault();
      dots[order[Math.min(m - 1, Math.max(0, there))]].focus();
    });
    const follow = (event) => {
      const box = svg.getBoundingClientRect();
      const unit = box.width / 360;
      const [x, y] = [(event.clientX - box.left) / unit, (event.clientY - box.top) / unit];
      const far = places.map(([cx, cy]) => Math.hypot(cx - x, cy - y));
      const nearest = far.indexOf(Math.min(...far));
      if (far[nearest] < NEAR && nearest !== state.point) point(nearest);
    };
    svg.addEventListener("pointermove", follow);
    svg.addEventListener("pointerdown", follow);

    draw();
    state.point = order[m - 1];
    show();
    part(".static").hidden = true;
    part(".live").hidden = false;
  };

  window.msifExplorers = window.msifExplorers ?? 0;
  document.querySelectorAll(".msif-explorer:not([data-method])").forEach((root) => {
    window.msifExplorers += 1;
    start(root, window.msifExplorers);
  });
})();
