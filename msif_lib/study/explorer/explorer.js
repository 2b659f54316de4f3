explore("explorer", (root, values) => {
  const ENDS = 4; // pretraining images shown at either end
  const part = (selector) => root.querySelector(selector);
  const { cases, pretrain, test, weights, scores, changes, agreement: fit } = values;
  const [m, count] = [pretrain.digits.length, test.digits.length];
  let row = 0; // 0 for all test images together, else one more than the test image
  let chosen = 0; // pretraining image
  const named = (i) => `pretraining image ${i}, a ${pretrain.digits[i]}`;
  const tested = (t) => `test image ${t}, a ${test.digits[t]}`;
  const predicted = (key, at, i) => -scores[key][at][i] / m;
  const change = (key, at, i) => changes[key].at(-1)[at][i];

  const pick = ({ at = row, i = chosen }) => {
    [row, chosen] = [at, i];
    show();
  };
  const tests = picker(
    part(".tests"),
    [null, ...test.images],
    [`all ${count} test images`, ...test.images.map((_, t) => tested(t))],
    (at) => pick({ at }),
  );
  const images = picker(part(".images"), pretrain.images, pretrain.digits.map((_, i) => named(i)), (i) =>
    pick({ i }),
  );

  const columns = cases.map(({ key, label }) => {
    const column = make("section", { "aria-label": label });
    const title = (text, node) => {
      column.append(make("p", { class: "title" }, text), node);
      return node;
    };
    column.append(make("p", { class: "case title" }, sentence(label)));
    const plot = (text, spec, click) => chart(title(text, make("div", { class: "chart" })), spec, click);
    part(".panels").append(column);
    return {
      key,
      label,
      helped: title("Helped most, by score I", make("ul", {})),
      hurt: title("Hurt most", make("ul", {})),
      overImages: plot("Every pretraining image, for the chosen test image", agreement, (i) => pick({ i })),
      overTests: plot("Every test image, without the chosen pretraining image", agreement, (i) =>
        pick({ at: i + 1 }),
      ),
      bend: plot("The chosen pair, by the weight of the pretraining image",
        lines("weight", { scale: { reverse: true } })), // prettier-ignore
    };
  });

  // Colours say how large a value is beside the largest of its kind.
  const colour = (tiles, name, list) => {
    const most = Math.max(...list.map(Math.abs)) || 1;
    tiles.forEach(({ tile }, k) => {
      const share = Math.round((100 * Math.abs(list[k])) / most);
      const full = color(list[k] > 0 ? 1 : 2);
      tile.style.setProperty(name, `color-mix(in srgb, ${full} ${share}%, transparent)`);
    });
  };

  const card = (key) => (i) => {
    const button = make("button", { type: "button", "aria-label": `${named(i)}, score ${number(scores[key][row][i])}` },
      make("img", { src: pretrain.images[i], alt: "" }), number(scores[key][row][i])); // prettier-ignore
    button.addEventListener("click", () => pick({ i }));
    return make("li", {}, button);
  };

  const show = () => {
    const order = (key) => pretrain.digits.map((_, i) => i).sort((a, b) => scores[key][row][a] - scores[key][row][b]);
    const which = row ? tested(row - 1) : `all ${count} test images`;
    tests[row].input.checked = true;
    images[chosen].input.checked = true;
    const said = columns.map(({ key, label, helped, hurt, overImages, overTests, bend }, k) => {
      const sorted = order(key);
      helped.replaceChildren(...sorted.slice(0, ENDS).map(card(key)));
      hurt.replaceChildren(...sorted.slice(-ENDS).reverse().map(card(key)));
      const all = pretrain.digits.map((_, i) => ({
        kind: "point", i, x: predicted(key, row, i), y: change(key, row, i), chosen: i === chosen,
      })); // prettier-ignore
      const each = test.digits.map((_, t) => ({
        kind: "picture", i: t, url: test.images[t], chosen: t === row - 1,
        x: predicted(key, t + 1, chosen), y: change(key, t + 1, chosen),
      })); // prettier-ignore
      colour(images, ["--one", "--two"][k], all.map(({ x }) => x));
      colour(tests.slice(1), ["--one", "--two"][k], each.map(({ y }) => y));
      const r = fit[key][row] === null ? "none" : fit[key][row].toFixed(3).replace("-", "−");
      const { x, y } = all[chosen];
      overImages([...all, ...equality(all)], `${m} pretraining images for ${which}, r = ${r}`);
      overTests([...each, ...equality(each)], `${count} test images without ${named(chosen)}`);
      const path = [1, ...weights].map((weight, at) => ({
        kind: "true", x: weight, y: at ? changes[key][at - 1][row][chosen] : 0, here: false,
      })); // prettier-ignore
      const straight = [1, 0].map((weight) => ({ kind: "predicted", x: weight, y: (1 - weight) * x }));
      const stops = path.slice(1).map((stop) => ({ ...stop, here: true }));
      bend([...path, ...straight, ...stops], `${named(chosen)} on ${which} by weight`);
      const far = each.map(({ y }) => Math.abs(y));
      const most = far.indexOf(Math.max(...far));
      return (
        `${label}: r = ${r} over the pretraining images; without this one predicted ${signed(x)}, ` +
        `true ${signed(y)}; ${tested(most)}, moves most (${signed(each[most].y)})`
      );
    });
    tests.slice(1).forEach(({ input, tile }, t) => {
      const wrong = cases.filter(({ key }) => test.taken[key][t] !== test.digits[t]);
      tile.classList.toggle("wrong", wrong.length > 0);
      const taken = wrong.map(({ key, label }) => `; ${label}: taken for a ${test.taken[key][t]}`);
      input.setAttribute("aria-label", tested(t) + taken.join(""));
    });
    part(".status").textContent = `${sentence(which)} and ${named(chosen)}. ${said.map(sentence).join(". ")}.`;
  };

  const ends = scores.fixed[0];
  chosen = ends.indexOf(Math.min(...ends));
  show();
});
