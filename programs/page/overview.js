// What is below the text: classes of tokens, the largest gains and losses, calibration.
function bar(mean, widest) { // to the right of the middle for a gain, to the left for a loss
  const width = (50 * Math.abs(mean)) / widest;
  return element("span", { class: "bar" }, element("i", { style: { width: `${width}%`, left: mean < 0 ? `${50 - width}%` : "50%", background: `rgba(var(${mean < 0 ? "--loss" : "--gain"}), .8)` } }));
}

function writeSlices() {
  const all = byId("slices"), rows = [];
  slices.forEach((of, s) => of.labels.forEach((label, l) => {
    const inside = (i) => of.which[i] === l, found = gainsOf(gain, inside);
    if (found.count) rows.push({ s, l, label, ...found, means: [found.mean, ...(other ? [gainsOf(otherGain, inside).mean, gainsOf(difference, inside).mean] : [])] });
  }));
  const widest = Math.max(0.01, ...rows.flatMap(({ means }) => means.map(Math.abs)));
  all.replaceChildren();
  const titles = other ? ["this", other.name, "this over it"] : ["nats"];
  all.style.setProperty("--figures", titles.length);
  all.append(element("div", { class: "head" }, element("span"), element("span"), ...[...titles, "tokens"].map((title) => element("span", { class: "figure", title }, title))));
  slices.forEach((of, s) => {
    all.append(element("h3", null, of.name));
    for (const { l, label, means, count, helped, hurt } of rows.filter((each) => each.s === s)) {
      const pressed = filter && filter.slice === s && filter.label === l;
      all.append(element("button", { type: "button", "aria-pressed": pressed ? "true" : "false", "data-slice": s, "data-label": l,
        title: `${count} tokens, helped ${percent(helped)}, hurt ${percent(hurt)}`,
        onclick: () => { filter = pressed ? null : { slice: s, label: l }; update(); } },
      element("span", null, label), element("span", null, ...means.map((mean) => bar(mean, widest))),
      ...[...means.map(signed), grouped(count)].map((written) => element("span", { class: "figure" }, written))));
    }
  });
}

function writeExtremes() {
  const column = judged(), order = Array.from({ length: n }, (_, i) => i).filter(inFilter).sort((a, b) => column[b] - column[a]);
  const line = (i) => element("button", { type: "button", "data-token": i, onclick: () => choose(i, true) },
    element("b", null, signed(column[i])), element("span", null, `${sentence(tokens.subarray(Math.max(0, i - 4), i))} [${shown(tokens[i])}]`));
  const over = isCompared() ? ` over ${other.name}` : "";
  byId("extremes").replaceChildren(element("h3", null, `gains${over}`), ...order.slice(0, 10).filter((i) => column[i] > 0).map(line),
    element("h3", null, `losses${over}`), ...order.slice(-10).reverse().filter((i) => column[i] < 0).map(line));
}

function calibrationOf(best) { // by tenths of the probability that was said of the favourite
  const bins = Array.from({ length: 10 }, () => ({ said: 0, right: 0, count: 0 }));
  for (let i = 0; i < n; i++) {
    if (!inFilter(i)) continue;
    const { id, p } = best(i), bin = bins[Math.min(9, Math.floor(10 * p))];
    bin.said += p; bin.right += id === tokens[i]; bin.count++;
  }
  return bins.filter((bin) => bin.count).map(({ said, right, count }) => ({ said: said / count, right: right / count, count }));
}

function drawn(tag, attributes, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

function writeCalibration() {
  const size = 300, margin = 34, x = (p) => margin + p * (size - margin - 8), y = (p) => size - margin - p * (size - margin - 8);
  const svg = drawn("svg", { viewBox: `0 0 ${size} ${size}`, role: "img", "aria-label": "How often the favourite was right, by the probability that was said of it" });
  svg.append(drawn("line", { x1: x(0), y1: y(0), x2: x(1), y2: y(1), stroke: "var(--line)" }));
  for (const p of [0, 0.5, 1]) svg.append(drawn("text", { x: x(p) - 6, y: size - margin + 16 }, String(p)), drawn("text", { x: 8, y: y(p) + 4 }, String(p)));
  svg.append(drawn("text", { x: x(0.3), y: size - 4 }, "probability that was said"), drawn("text", { x: x(0.02), y: 12 }, "share that was right"));
  const lm = candidates.lm, favourite = (i) => ({ id: lm.ids[i * lm.width], p: lm.probs[i * lm.width] });
  [[baseName, "--loss", "4 3", favourite], ["mixture", "--gain", "none", favouriteOf]].forEach(([title, ink, dashes, best], c) => {
    const points = calibrationOf(best), stroke = `rgb(var(${ink}))`;
    svg.append(drawn("polyline", { points: points.map((p) => `${x(p.said)},${y(p.right)}`).join(" "), fill: "none", stroke, "stroke-dasharray": dashes, "stroke-width": 2 }));
    for (const p of points) svg.append(drawn("circle", { cx: x(p.said), cy: y(p.right), r: 2 + 5 * Math.sqrt(p.count / n), fill: stroke, "fill-opacity": 0.6 }, drawn("title", {}, `${p.count} tokens: said ${p.said.toFixed(2)}, right ${p.right.toFixed(2)}`)));
    svg.append(drawn("line", { x1: x(0.62), x2: x(0.7), y1: y(0.1 - 0.07 * c) - 4, y2: y(0.1 - 0.07 * c) - 4, stroke, "stroke-dasharray": dashes, "stroke-width": 2 }), drawn("text", { x: x(0.72), y: y(0.1 - 0.07 * c) }, title));
  });
  byId("calibration").replaceChildren(svg);
}
