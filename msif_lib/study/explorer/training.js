// Two recorded trainings, taken again step by step with other weights of the first stage's images.
// The model is softmax(V tanh(W x + b) + c); p holds W, b and then the heads of both stages.
const msifTrainings = (problem) => {
  "use strict";
  const { levels, hidden, stages, test } = problem;
  const pixels = test.pixels[0].length;
  const images = ({ pixels, labels }) => ({
    x: Float64Array.from(pixels.flat(), (value) => levels[value]),
    labels,
  });
  const start = [...problem.embedding];
  const trained = stages.map((stage) => {
    const head = start.length; // where its head begins
    start.push(...stage.head);
    const classes = stage.head.length / (hidden + 1);
    return { ...stage, ...images(stage), head, classes, ones: stage.labels.map(() => 1) };
  });
  const tested = images(test);
  const a = new Float64Array(hidden); // of the image that was looked at last: features,
  const o = new Float64Array(Math.max(...trained.map(({ classes }) => classes))); // probabilities

  const look = (p, { head, classes }, x, n) => {
    for (let j = 0; j < hidden; j += 1) {
      let sum = p[hidden * pixels + j];
      for (let k = 0; k < pixels; k += 1) sum += p[j * pixels + k] * x[n * pixels + k];
      a[j] = Math.tanh(sum);
    }
    let total = 0;
    for (let c = 0; c < classes; c += 1) {
      let sum = p[head + classes * hidden + c];
      for (let j = 0; j < hidden; j += 1) sum += p[head + c * hidden + j] * a[j];
      o[c] = Math.exp(sum);
      total += o[c];
    }
    for (let c = 0; c < classes; c += 1) o[c] /= total;
  };

  const losses = (p) =>
    Float64Array.from(tested.labels, (label, n) => {
      look(p, trained[1], tested.x, n);
      return -Math.log(o[label]);
    });

  // One step of SGD with momentum on (1/B) Σ w_i ℓ_i + l2/2 ‖W, b, head‖².
  const step = (p, v, stage, t, weights) => {
    const { x, labels, head, classes, l2, momentum } = stage;
    const batch = stage.batches[t];
    const g = new Float64Array(p.length);
    for (let q = 0; q < hidden * (pixels + 1); q += 1) g[q] = l2 * p[q];
    for (let q = head; q < head + classes * (hidden + 1); q += 1) g[q] = l2 * p[q];
    for (const n of batch) {
      look(p, stage, x, n);
      for (let c = 0; c < classes; c += 1) {
        o[c] = (weights[n] / batch.length) * (o[c] - (c === labels[n] ? 1 : 0));
        g[head + classes * hidden + c] += o[c];
      }
      for (let j = 0; j < hidden; j += 1) {
        let back = 0;
        for (let c = 0; c < classes; c += 1) {
          back += o[c] * p[head + c * hidden + j];
          g[head + c * hidden + j] += o[c] * a[j];
        }
        back *= 1 - a[j] * a[j];
        g[hidden * pixels + j] += back;
        for (let k = 0; k < pixels; k += 1) g[j * pixels + k] += back * x[n * pixels + k];
      }
    }
    for (let q = 0; q < p.length; q += 1) {
      v[q] = momentum * v[q] + g[q];
      p[q] -= stage.rates[t] * v[q];
    }
  };

  // The test losses before the first step, and after each step of both stages.
  const training = function* (weights) {
    const p = Float64Array.from(start);
    yield losses(p);
    for (const stage of trained) {
      const v = new Float64Array(p.length);
      for (let t = 0; t < stage.batches.length; t += 1) {
        step(p, v, stage, t, stage === trained[0] ? weights : stage.ones);
        yield losses(p);
      }
    }
  };

  const ones = trained[0].ones;
  const base = [...training(ones)];
  const known = new Map();
  // d loss / d w_i after each step, by a central difference: its error is some 1e-8 of it.
  const derivative = (i) => {
    const at = (weight) => [...training(ones.map((one, k) => (k === i ? weight : one)))];
    if (!known.has(i)) {
      const [more, less] = [at(1 + 1e-4), at(1 - 1e-4)];
      known.set(i, more.map((row, t) => row.map((value, k) => (value - less[t][k]) / 2e-4)));
    }
    return known.get(i);
  };
  const zero = base[0].map(() => 0);
  return {
    lengths: trained.map(({ batches }) => batches.length),
    // Changes of the test losses, one yield a step.
    *changes(weights) {
      let t = -1;
      for (const row of training(weights)) {
        t += 1;
        yield row.map((value, k) => value - base[t][k]);
      }
    },
    // What the derivative says of them after t steps.
    predicted: (weights, t) =>
      weights.reduce(
        (sum, weight, i) =>
          weight === 1 ? sum : sum.map((value, k) => value + (weight - 1) * derivative(i)[t][k]),
        zero,
      ),
  };
};
