explore("retrain", (root, values) => {
  const part = (selector) => root.querySelector(selector);
  const { pretrain, test, scores } = values;
  const { lengths, changes, predicted } = msifTrainings(values);
  const [m, last] = [scores.length, sum(lengths)];
  const weights = scores.map(() => 1);
  const mean = (row) => sum([...row]) / row.length;
  let chosen = 0;
  let taken = []; // by step, the changes of the test losses
  let shown = last; // the step that the charts are at
  let frame = 0; // what is to be done when the screen is drawn next
  const [slider, steps] = [part(".weight"), part(".step")];
  steps.max = last;

  const named = (i) => `pretraining image ${i}, a ${pretrain.digits[i]}`;
  const foretold = (from = weights) =>
    test.digits.map((_, k) => sum(from.map((weight, i) => ((weight - 1) * scores[i][k]) / m)));
  const but = (weight) => weights.map((other, i) => (i === chosen ? weight : other));

  const tests = chart(part(".tests"), agreement);
  const course = chart(part(".steps"), lines("step", { scale: { domain: [0, last] } }));
  const bend = chart(part(".bend"), lines("weight of the image", { scale: { reverse: true } }));

  // The charts after so many steps. A test image begins where its score puts it, and each step moves
  // it by what the derivative does not say of that step; after the last one it is at the true change.
  const show = (step) => {
    shown = step;
    const target = foretold();
    const meant = taken.map((_, t) => predicted(weights, t));
    const points = target.map((x, k) => ({
      kind: "point",
      x,
      from: x,
      y: x + taken[step][k] - meant[step][k],
    }));
    const means = [mean(target), mean(points.map(({ y }) => y))];
    const told = `predicted ${signed(means[0])}, true ${signed(means[1])}`;
    tests([...points, ...equality(points)], `Test images by change of their loss; mean ${told}`);
    const rows = taken.slice(0, step + 1).map((row, x) => ({ kind: "true", x, y: mean(row) }));
    rows.push(...meant.map((row, x) => ({ kind: "predicted", x, y: mean(row) })));
    course([...rows, { ...rows[step], here: true }], `Change of the mean loss by step; ${told}`);
    steps.value = step;
    const [at, of] = step > lengths[0] ? [step - lengths[0], lengths[1]] : [step, lengths[0]];
    part(".step + output").textContent =
      `${at} of ${of} of ${step > lengths[0] ? "finetuning" : "pretraining"}`;
    return told;
  };

  // The ends of trainings with other weights of the chosen image, one at each drawing of the screen.
  const follow = (ends = []) => {
    const grid = [...Array(11).keys()].map((k) => 1 - k / 10);
    if (ends.length < grid.length) {
      const rows = [...changes(but(grid[ends.length]))];
      frame = requestAnimationFrame(() => follow([...ends, mean(rows[last])]));
    }
    const rows = ends.map((y, k) => ({ kind: "true", x: grid[k], y }));
    rows.push(...[1, 0].map((x) => ({ kind: "predicted", x, y: mean(foretold(but(x))) })));
    rows.push({ kind: "true", x: weights[chosen], y: mean(taken[last]), here: true });
    bend(rows, `Change of the mean loss by the weight of ${named(chosen)}`);
  };

  const finish = () => {
    const others = weights.filter((weight, i) => weight < 1 && i !== chosen).length;
    part(".status").textContent = sentence(
      `${named(chosen)}, has weight ${number(weights[chosen])}` +
        (others ? `, and ${others} more have less than 1` : "") +
        `. Change of the mean test loss: ${show(last)}.`,
    );
    follow();
    const detail = { weights, predicted: foretold(), changes: [...taken[last]] };
    root.dispatchEvent(new CustomEvent("msif-trained", { detail }));
  };

  // Train again: at once, or a step at each drawing of the screen.
  const train = (watched) => {
    cancelAnimationFrame(frame);
    const training = changes(weights);
    taken = [];
    const further = () => {
      let next;
      do {
        next = training.next();
        if (next.done) return finish();
        taken.push(next.value);
      } while (!watched);
      show(taken.length - 1);
      frame = requestAnimationFrame(further);
    };
    further();
  };

  const tiles = picker(part(".images"), pretrain.images, pretrain.images.map((_, i) => named(i)), (i) => {
    chosen = i;
    weigh(weights[i]);
  });
  const weigh = (weight, watched = false) => {
    weights[chosen] = weight;
    slider.value = weight;
    part(".weight + output").textContent = number(weight);
    tiles.forEach(({ input, tile }, i) => {
      const light = weights[i] < 1 ? `, weight ${number(weights[i])}` : "";
      input.setAttribute("aria-label", named(i) + light);
      tile.style.setProperty("--weight", weights[i]);
    });
    train(watched);
  };
  slider.addEventListener("input", () => weigh(Number(slider.value)));
  steps.addEventListener("input", () => {
    if (taken.length > last) show(Number(steps.value));
  });
  part(".out").addEventListener("click", () =>
    weigh(0, !matchMedia("(prefers-reduced-motion: reduce)").matches),
  );
  part(".back").addEventListener("click", () => {
    weights.fill(1);
    weigh(1);
  });

  // It begins with the image whose score says most, still in place.
  const size = scores.map((row) => Math.abs(mean(row)));
  chosen = size.indexOf(Math.max(...size));
  tiles[chosen].input.checked = true;
  weigh(1);
});
