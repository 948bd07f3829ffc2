// The text, coloured; the totals above it; and the settings.
const byId = (id) => document.getElementById(id);
function element(tag, attributes, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name === "style") Object.assign(made.style, value);
    else if (value !== null && value !== undefined) made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}
const percent = (x) => `${(100 * x).toFixed(1)} %`;
const signed = (x) => (x >= 0 ? "+" : "−") + Math.abs(x).toFixed(2);
const probability = (p) => (p === 0 ? "0" : p >= 0.001 ? p.toFixed(4) : p.toExponential(1));
const figure = (x) => (Math.abs(x) >= 1000 ? x.toFixed(0) : x.toPrecision(4));
const grouped = (count) => String(count).replace(/\B(?=(\d{3})+$)/g, ","); // by thousands; Intl takes its time to load
const shown = (number) => (number < words.length ? words[number] : "").replace(/\n/g, "↵");
const sentence = (numbers) => Array.from(numbers, shown).join(content.joiner);

// -- the text -------------------------------------------------------------------------------------

const PASSAGE = 60; // tokens after which a passage ends with its line; a browser lays out those in sight
const text = byId("text"), spans = [];
function writeText() {
  const all = document.createDocumentFragment();
  if (content.joiner === "") text.classList.add("letters");
  let passage = null, begun = 0;
  for (let i = 0; i < n; i++) {
    const follows = i > 0 && positions[i] === positions[i - 1] + 1;
    if (!passage || (i - begun >= PASSAGE && (!follows || words[tokens[i - 1]].includes("\n")))) {
      passage = all.appendChild(element("div"));
      begun = i;
    }
    if (i && !follows) passage.append(element("i", null, "⋯"), "\n");
    const word = words[tokens[i]], span = document.createElement("span");
    span.id = `t${i}`;
    span.textContent = shown(tokens[i]);
    spans.push(span);
    passage.append(span, word.includes("\n") ? "\n" : content.joiner);
  }
  text.append(all);
}

const columns = { // by the name of a colouring: its title and how strong a token is coloured, -1 to 1
  gain: [`gain over the ${baseName}`, (i) => gain[i] / 3],
  mixture: ["probability: mixture", (i) => Math.exp(mixture[i])],
};
if (other) columns.other = [`gain over ${other.name}`, (i) => difference[i] / 3];
sources.forEach((name) => { columns[`p:${name}`] = [`probability: ${nameOf(name)}`, (i) => Math.exp(logProbOf(name)[i])]; });
memories.forEach((name, m) => { columns[`w:${name}`] = [`weight: ${name}`, (i) => weights[m + 1][i]]; });
if (near) {
  let ends = null;
  columns.distance = ["nearness of the nearest neighbour", (i) => {
    if (!ends) {
      const distances = Array.from({ length: n }, (_, t) => -near.scores[t * near.kept]).filter(Number.isFinite).sort((a, b) => a - b);
      ends = [distances[0], distances[Math.floor(0.95 * (distances.length - 1))]];
    }
    return 1 - Math.min(1, (-near.scores[i * near.kept] - ends[0]) / (ends[1] - ends[0] || 1));
  }];
}
if (content.suffix_lengths) columns.suffix = ["length of the matched suffix", (i) => Math.min(1, content.suffix_lengths[i] / 12)];
let colour = other ? "other" : "gain", chosen = -1;

const isCompared = () => colour === "other";
const judged = () => (isCompared() ? difference : gain); // what is large, and what is helped or hurt
const STEPS = 12; // of a colour, as in page.css

function colourText() {
  const diverges = colour === "gain" || colour === "other", strength = columns[colour][1];
  for (let i = 0; i < n; i++) {
    const x = Math.max(-1, Math.min(1, strength(i) || 0)), step = Math.round(STEPS * Math.sqrt(Math.abs(x)));
    const named = step ? `${diverges ? (x < 0 ? "loss" : "gain") : "amount"} s${step}` : "";
    spans[i].className = inFilter(i) ? named : `${named} dim`;
  }
  const swatch = (ink, step, title) => element("span", { class: `${ink} s${step}` }, title);
  byId("legend").replaceChildren(...(diverges ? [swatch("loss", STEPS, "loses 3 nats"), " ", swatch("loss", 5, "½"), " 0 ", swatch("gain", 5, "½"), " ", swatch("gain", STEPS, "gains 3 nats or more")]
    : ["little ", swatch("amount", 3, " "), swatch("amount", 8, " "), swatch("amount", STEPS, " "), " much"]));
  mark();
}

let chain = null; // the tokens that are underlined, first and last
function mark() {
  for (const span of text.querySelectorAll(".chosen, .chain")) span.classList.remove("chosen", "chain");
  if (chosen < 0) return;
  spans[chosen].classList.add("chosen");
  if (chain) for (let t = chain.first; t <= chain.last; t++) spans[t].classList.add("chain");
}

// -- above the text -------------------------------------------------------------------------------

const shortPerplexity = (p) => (p < 1e6 ? p.toFixed(2) : p.toExponential(2));

function total(title, data, value, written) {
  return element("div", { "data-name": data, "data-value": value }, element("b", null, written), element("span", null, title));
}

function figuresOf(before, lm, mixed, column) { // of a result: its perplexities, and what it gains
  const all = gainsOf(column, inFilter), base = perplexity(lm), ppl = perplexity(mixed);
  return [
    [`${before}lm`, base, shortPerplexity(base)], [`${before}mixture`, ppl, shortPerplexity(ppl)], [`${before}gain`, all.mean, signed(all.mean)],
    [`${before}helped`, all.helped, percent(all.helped)], [`${before}hurt`, all.hurt, percent(all.hurt)],
  ];
}

function sideBySide(titles, own) { // the two results, and the first one over the second
  const over = gainsOf(difference, inFilter), ratio = Math.exp(-over.mean);
  const rows = [
    ["this result", own],
    [other.name, figuresOf("other-", other.log_probs.lm, other.log_probs.mixture, otherGain)],
    [`this over ${other.name}`, [["over-lm", "", ""], ["over-mixture", ratio, `× ${ratio.toFixed(3)}`], ["over-gain", over.mean, signed(over.mean)],
      ["over-helped", over.helped, percent(over.helped)], ["over-hurt", over.hurt, percent(over.hurt)]]],
  ];
  return element("table", { class: "results" }, element("thead", null, element("tr", null, ...["", ...titles].map((title, c) => element("th", c ? { class: "number" } : null, title)))),
    element("tbody", null, ...rows.map(([title, cells]) => element("tr", null, element("th", { scope: "row" }, title),
      ...cells.map(([data, value, written]) => element("td", { class: "number", "data-name": data, "data-value": value }, written))))));
}

function writeTotals() {
  const found = byId("totals"), count = gainsOf(gain, inFilter).count;
  const titles = [other && other.base !== baseName ? "model" : baseName, "mixture", "mean gain, nats", "helped", "hurt"];
  const own = figuresOf("", logProbs.lm, mixture, gain);
  found.replaceChildren();
  if (content.lm_alone) { const alone = perplexity(content.lm_alone); found.append(total("LM", "alone", alone, shortPerplexity(alone))); }
  if (other) found.prepend(sideBySide(titles, own)); else found.append(...own.map((figures, f) => total(titles[f], ...figures)));
  found.append(total(filter ? "tokens of the class" : "tokens", "tokens", count, grouped(count)));
  memories.forEach((name, m) => { const weight = mean(weights[m + 1]); found.append(total(`weight of ${name}`, `weight-${name}`, weight, weight.toFixed(2))); });
}

const kSteps = [];
if (near) {
  for (let k = 1; k < near.kept; k *= 2) kSteps.push(k);
  kSteps.push(near.kept);
  if (near.k > near.kept) kSteps.push(near.k); // only with the temperature of the evaluation
}

function slider(id, title, attributes, value, write, read) {
  const output = element("output", { for: id }, write(value));
  const input = element("input", { id, type: "range", ...attributes });
  input.value = value;
  input.addEventListener("input", () => { read(Number(input.value)); update(); });
  return element("label", null, `${title} `, output, input);
}

function writeSliders() {
  const all = byId("sliders");
  all.replaceChildren();
  for (const name of memories) {
    const box = element("input", { id: `on-${name}`, type: "checkbox" });
    box.checked = settings.on[name];
    box.addEventListener("change", () => { settings.on[name] = box.checked; update(); });
    const title = name === "knn" && memories.length === 1 ? "lmbda" : `weight of ${name}`;
    const weight = slider(`weight-${name}`, title, { min: 0, max: 0.99, step: 0.01 }, settings.weight[name].toFixed(4),
      () => (settings.asEvaluated ? `${settings.weight[name].toFixed(2)}${content.constant ? "" : " on average"}` : settings.weight[name].toFixed(2)),
      (value) => { settings.asEvaluated = false; settings.weight[name] = value; });
    all.append(element("div", null, element("label", null, box, ` ${name}`), weight));
  }
  if (!near) return;
  const log = Math.log2(settings.temperature);
  all.append(slider("temperature", "temperature", { min: -4, max: 10, step: "any" }, log,
    () => figure(settings.temperature),
    (value) => { settings.temperature = 2 ** value; settings.k = Math.min(settings.k, near.kept); }));
  all.append(slider("k", "k", { min: 0, max: kSteps.length - 1, step: 1 }, kSteps.indexOf(settings.k),
    () => String(settings.k),
    (value) => { settings.k = kSteps[value]; if (settings.k > near.kept) settings.temperature = near.temperature; }));
}

function writeOutputs() { // in place of all sliders, one of which a hand may hold
  const held = document.activeElement;
  if (!held || !held.closest("#sliders")) { writeSliders(); return; }
  const write = (id, value) => { byId(id).previousElementSibling.textContent = value; };
  for (const name of memories) write(`weight-${name}`, settings.weight[name].toFixed(2));
  if (!near) return;
  write("temperature", figure(settings.temperature));
  write("k", settings.k);
  if (held.id !== "k") byId("k").value = kSteps.indexOf(settings.k);
  if (held.id !== "temperature") byId("temperature").value = Math.log2(settings.temperature);
}

// What a test or a curious reader sets: exact numbers, where sliders have steps.
window.setPage = ({ weights: given, ...others }) => {
  Object.assign(settings, others);
  if (given) { settings.asEvaluated = false; Object.assign(settings.weight, given); }
  update();
};
