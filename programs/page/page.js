"use strict";
// What a page does when it is open: mixes what is stored, colours the text, explains a token.
// Text of the corpus is only ever set as text, never as HTML.
(() => {
  const content = JSON.parse(document.getElementById("content").textContent);
  const ARRAYS = { f8: Float64Array, f4: Float32Array, i4: Int32Array, u2: Uint16Array, u4: Uint32Array };
  const LARGE = 1, MARGIN = 0.01; // nats: a large gain; what counts as helped or hurt

  function unpack(packed) {
    if (!packed) return null;
    const raw = atob(packed.data), bytes = new Uint8Array(raw.length);
    for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
    return new ARRAYS[packed.type](bytes.buffer);
  }
  const unpackAll = (of) => Object.fromEntries(Object.entries(of).map(([name, packed]) => [name, unpack(packed)]));

  const words = content.words, tokens = unpack(content.tokens), positions = unpack(content.positions);
  const n = tokens.length, sources = content.sources, memories = sources.slice(1);
  const logProbs = unpackAll(content.log_probs), evaluatedWeights = unpackAll(content.weights);
  const candidates = {};
  for (const [name, of] of Object.entries(content.candidates))
    candidates[name] = { ids: unpack(of.ids), probs: unpack(of.probs), ranks: unpack(of.ranks), width: of.width };
  const near = content.neighbors && {
    ...content.neighbors,
    scores: unpack(content.neighbors.scores), rows: unpack(content.neighbors.rows),
    values: unpack(content.neighbors.values), counts: unpack(content.neighbors.counts),
  };
  const suffixLengths = unpack(content.suffix_lengths), occurrences = unpack(content.occurrences);
  const lmAlone = unpack(content.lm_alone);
  const windows = { starts: unpack(content.windows.starts), lines: unpack(content.windows.lines),
    lengths: unpack(content.windows.lengths), tokens: unpack(content.windows.tokens) };
  windows.offsets = new Int32Array(windows.starts.length);
  for (let i = 1; i < windows.starts.length; i++) windows.offsets[i] = windows.offsets[i - 1] + windows.lengths[i - 1];
  const slices = content.slices.map((of) => ({ ...of, which: unpack(of.which) }));
  const other = content.other && { name: content.other.name, logProbs: unpack(content.other.log_probs) };
  const baseName = lmAlone ? "GNN-LM" : "LM";
  const nameOf = (source) => (source === "lm" ? baseName : source);

  // -- settings and what follows from them ------------------------------------------------------

  const mean = (column) => column.reduce((sum, x) => sum + x, 0) / column.length;
  function evaluated() {
    return {
      asEvaluated: true,
      weight: Object.fromEntries(memories.map((name) => [name, mean(evaluatedWeights[name])])),
      on: Object.fromEntries(memories.map((name) => [name, true])),
      temperature: near ? near.temperature : 1,
      k: near ? near.k : 0,
    };
  }
  let settings = evaluated(), filter = null, chosen = -1, colour = "gain";
  let knn = null, mixture = new Float64Array(n), gain = new Float64Array(n);

  const knnIsStored = () => settings.temperature === near.temperature && settings.k === near.k;

  function scoreOf(i, j) { // of a neighbour that stands for several entries: all of theirs
    const at = i * near.kept + j;
    return near.scores[at] / settings.temperature + (near.counts ? Math.log(near.counts[at]) : 0);
  }

  function sharesOf(i) { // softmax of the scores of the nearest k
    const k = Math.min(settings.k, near.kept), shares = new Float64Array(k);
    let highest = -Infinity, sum = 0;
    for (let j = 0; j < k; j++) { shares[j] = scoreOf(i, j); if (shares[j] > highest) highest = shares[j]; }
    if (highest === -Infinity) return shares.fill(0);
    for (let j = 0; j < k; j++) sum += shares[j] = Math.exp(shares[j] - highest);
    for (let j = 0; j < k; j++) shares[j] /= sum;
    return shares;
  }

  function knnLogProbs() {
    if (knnIsStored()) return logProbs.knn;
    const found = new Float64Array(n);
    for (let i = 0; i < n; i++) {
      const shares = sharesOf(i);
      let p = 0;
      for (let j = 0; j < shares.length; j++) if (near.values[i * near.kept + j] === tokens[i]) p += shares[j];
      found[i] = Math.log(p);
    }
    return found;
  }

  function weightsOf(i) { // of all sources; they sum to one
    const weights = sources.map((name) => {
      if (name !== "lm" && !settings.on[name]) return 0;
      if (settings.asEvaluated) return evaluatedWeights[name][i];
      if (name !== "lm") return settings.weight[name];
      return Math.max(0, 1 - memories.reduce((sum, memory) => sum + settings.weight[memory], 0));
    });
    const sum = weights.reduce((a, b) => a + b, 0);
    return sum > 0 ? weights.map((weight) => weight / sum) : weights.map((_, s) => (s ? 0 : 1));
  }

  const logProbOf = (name) => (name === "knn" && near ? knn : logProbs[name]);

  function compute() {
    knn = near ? knnLogProbs() : null;
    for (let i = 0; i < n; i++) {
      const weights = weightsOf(i);
      let p = 0;
      sources.forEach((name, s) => { if (weights[s] > 0) p += weights[s] * Math.exp(logProbOf(name)[i]); });
      mixture[i] = Math.log(p);
      gain[i] = mixture[i] - logProbs.lm[i];
    }
  }

  const inFilter = (i) => !filter || slices[filter.slice].which[i] === filter.label;

  function summary(column) { // over the tokens of the chosen class
    let sum = 0, count = 0;
    for (let i = 0; i < n; i++) if (inFilter(i)) { sum -= column[i]; count++; }
    return { ppl: Math.exp(sum / count), count };
  }

  function gainsOf(which) {
    let sum = 0, helped = 0, hurt = 0, count = 0;
    for (let i = 0; i < n; i++) {
      if (!which(i)) continue;
      count++; sum += gain[i];
      if (gain[i] > MARGIN) helped++; else if (gain[i] < -MARGIN) hurt++;
    }
    return { mean: count ? sum / count : 0, helped: helped / count, hurt: hurt / count, count };
  }

  // -- elements ---------------------------------------------------------------------------------

  const byId = (id) => document.getElementById(id);
  function element(tag, attributes, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes || {})) {
      if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
      else if (name === "style") Object.assign(made.style, value);
      else if (value !== null && value !== undefined) made.setAttribute(name, value);
    }
    for (const child of children) made.append(child);
    return made;
  }
  const percent = (x) => `${(100 * x).toFixed(1)} %`;
  const signed = (x) => (x >= 0 ? "+" : "−") + Math.abs(x).toFixed(2);
  const probability = (p) => (p === 0 ? "0" : p >= 0.001 ? p.toFixed(4) : p.toExponential(1));
  const figure = (x) => (Math.abs(x) >= 1000 ? x.toFixed(0) : x.toPrecision(4));
  const shown = (number) => (number < words.length ? words[number] : "").replace(/\n/g, "↵");
  const sentence = (numbers) => Array.from(numbers, shown).join(content.joiner);

  // -- the text ---------------------------------------------------------------------------------

  const text = byId("text"), spans = [];
  function writeText() {
    const all = document.createDocumentFragment();
    if (content.joiner === "") text.classList.add("letters");
    for (let i = 0; i < n; i++) {
      if (i && positions[i] !== positions[i - 1] + 1) all.append(element("i", null, "⋯"), "\n");
      const word = words[tokens[i]], span = element("span", { id: `t${i}` }, shown(tokens[i]));
      span.number = i;
      spans.push(span);
      all.append(span, word.includes("\n") ? "\n" : content.joiner);
    }
    text.append(all);
  }

  const columns = { // by the name of a colouring: its title and how strong a token is coloured, -1 to 1
    gain: [`gain over the ${baseName}`, (i) => gain[i] / 3],
    mixture: ["probability: mixture", (i) => Math.exp(mixture[i])],
  };
  for (const name of sources) columns[`p:${name}`] = [`probability: ${nameOf(name)}`, (i) => Math.exp(logProbOf(name)[i])];
  for (const name of memories) columns[`w:${name}`] = [`weight: ${name}`, (i) => weightsOf(i)[sources.indexOf(name)]];
  if (near) {
    const distances = Array.from({ length: n }, (_, i) => -near.scores[i * near.kept]).filter(Number.isFinite).sort((a, b) => a - b);
    const low = distances[0], high = distances[Math.floor(0.95 * (distances.length - 1))];
    columns.distance = ["nearness of the nearest neighbour", (i) => 1 - Math.min(1, (-near.scores[i * near.kept] - low) / (high - low || 1))];
  }
  if (suffixLengths) columns.suffix = ["length of the matched suffix", (i) => Math.min(1, suffixLengths[i] / 12)];
  if (other) columns.other = [`gain over ${other.name}`, (i) => (mixture[i] - other.logProbs[i]) / 3];

  function colourText() {
    const diverges = colour === "gain" || colour === "other", strength = columns[colour][1];
    for (let i = 0; i < n; i++) {
      const x = Math.max(-1, Math.min(1, strength(i) || 0));
      const ink = diverges ? (x < 0 ? "--loss" : "--gain") : "--amount";
      spans[i].style.background = Math.abs(x) < 0.02 ? "" : `rgba(var(${ink}), ${(0.6 * Math.sqrt(Math.abs(x))).toFixed(3)})`;
      spans[i].classList.toggle("dim", !inFilter(i));
    }
  }

  // -- above the text ---------------------------------------------------------------------------

  function total(title, value, data) {
    return element("div", { "data-name": data, "data-value": value.number }, element("b", null, value.text), element("span", null, title));
  }

  function writeTotals() {
    const all = gainsOf(inFilter), found = byId("totals");
    const ppl = (column) => { const p = summary(column).ppl; return { number: p, text: p < 1e6 ? p.toFixed(2) : p.toExponential(2) }; };
    found.replaceChildren();
    if (lmAlone) found.append(total("LM", ppl(lmAlone), "alone"));
    found.append(total(baseName, ppl(logProbs.lm), "lm"), total("mixture", ppl(mixture), "mixture"));
    if (other) found.append(total(other.name, ppl(other.logProbs), "other"));
    found.append(
      total("mean gain, nats", { number: all.mean, text: signed(all.mean) }, "gain"),
      total("helped", { number: all.helped, text: percent(all.helped) }, "helped"),
      total("hurt", { number: all.hurt, text: percent(all.hurt) }, "hurt"),
      total(filter ? "tokens of the class" : "tokens", { number: all.count, text: String(all.count) }, "tokens"),
    );
    for (const name of memories) {
      let sum = 0;
      for (let i = 0; i < n; i++) sum += weightsOf(i)[sources.indexOf(name)];
      found.append(total(`weight of ${name}`, { number: sum / n, text: (sum / n).toFixed(2) }, `weight-${name}`));
    }
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

  // What a test or a curious reader sets: exact numbers, where sliders have steps.
  window.setPage = (wanted) => {
    const { weights, ...others } = wanted;
    Object.assign(settings, others);
    if (weights) { settings.asEvaluated = false; Object.assign(settings.weight, weights); }
    update();
  };

  // -- a token ----------------------------------------------------------------------------------

  function windowOf(row) { // which stretch of the training text holds a row
    let low = 0, high = windows.starts.length - 1;
    while (low < high) { const middle = (low + high + 1) >> 1; if (windows.starts[middle] <= row) low = middle; else high = middle - 1; }
    return low;
  }

  function around(row) { // the text before a row of the training text, its token, the text after, its line
    const w = windowOf(row), at = row - windows.starts[w], begin = windows.offsets[w], end = begin + windows.lengths[w];
    const place = begin + at, first = Math.max(begin, place - content.context);
    let line = windows.lines[w];
    for (let i = begin; i < place; i++) if (words[windows.tokens[i]] === "\n") line++;
    return {
      before: sentence(windows.tokens.subarray(first, place)), token: shown(windows.tokens[place]),
      after: sentence(windows.tokens.subarray(place + 1, Math.min(end, place + 1 + content.following))), line,
    };
  }

  function candidatesOf(name, i) { // the most probable tokens of a source
    if (name === "knn" && near && !knnIsStored()) {
      const sums = new Map(), shares = sharesOf(i);
      shares.forEach((share, j) => { const id = near.values[i * near.kept + j]; sums.set(id, (sums.get(id) || 0) + share); });
      return [...sums].map(([id, p]) => ({ id, p })).filter(({ p }) => p > 0).sort((a, b) => b.p - a.p).slice(0, 10);
    }
    const of = candidates[name], found = [];
    for (let j = i * of.width; j < (i + 1) * of.width; j++) if (of.probs[j] > 0) found.push({ id: of.ids[j], p: of.probs[j] });
    return found;
  }

  function mixedCandidates(i) { // as far as the lists of the sources tell; a list leaves out what is rare
    const sums = new Map(), weights = weightsOf(i);
    sources.forEach((name, s) => {
      for (const { id, p } of candidatesOf(name, i)) if (weights[s] > 0) sums.set(id, (sums.get(id) || 0) + weights[s] * p);
    });
    if (mixture[i] > -Infinity) sums.set(tokens[i], Math.exp(mixture[i]));
    return [...sums].map(([id, p]) => ({ id, p })).sort((a, b) => b.p - a.p);
  }

  function rankOf(name, i) {
    if (Math.exp(logProbOf(name)[i]) === 0) return "–";
    if (name === "knn" && near && !knnIsStored()) {
      const place = candidatesOf(name, i).findIndex(({ id }) => id === tokens[i]);
      return place < 0 ? "> 10" : String(place + 1);
    }
    const rank = candidates[name].ranks[i];
    return rank ? String(rank) : `> ${content.model_top}`;
  }

  function tableOf(head, rows) {
    const cells = (tag, row) => row.map((cell, c) => element(tag, c && typeof cell === "string" ? { class: "number" } : null, cell));
    return element("table", null, element("thead", null, element("tr", null, ...cells("th", head))),
      element("tbody", null, ...rows.map(({ cells: row, target }) => element("tr", target ? { class: "target" } : null, ...cells("td", row)))));
  }

  function neighborsTable(i) {
    const shares = sharesOf(i), groups = new Map();
    for (let j = 0; j < shares.length; j++) {
      const row = near.rows[i * near.kept + j];
      if (row < 0) continue;
      const where = around(row), key = `${where.before}\u0000${where.token}`, group = groups.get(key);
      if (group) { group.share += shares[j]; group.rows.push(row); } else
        groups.set(key, { ...where, row, rows: [row], share: shares[j], distance: -near.scores[i * near.kept + j], value: near.values[i * near.kept + j] });
    }
    const body = [...groups.values()].sort((a, b) => b.share - a.share).map((group) => element("tr", { "data-row": group.row, class: group.value === tokens[i] ? "hit" : null },
      element("td", { class: "number" }, percent(group.share), element("br"), element("span", { class: "share", style: { width: `${(4 * group.share).toFixed(2)}rem` } })),
      element("td", { class: "context" }, `… ${group.before}${content.joiner}`, element("b", null, group.token), group.rows.length > 1 ? ` (${group.rows.length} times)` : ""),
      element("td", { class: "number" }, figure(group.distance)),
      element("td", { class: "number" }, `${group.row.toLocaleString("en")}`, element("br"), `line ${(group.line + 1).toLocaleString("en")}`)));
    return element("table", { class: "neighbors" }, element("thead", null, element("tr", null,
      ...["share", "context and what followed", "distance", "row"].map((title, c) => element("th", c === 1 ? null : { class: "number" }, title)))), element("tbody", null, ...body));
  }

  const rowSets = new Map();
  function rowsOf(i) {
    if (!rowSets.has(i)) rowSets.set(i, new Set(near.rows.subarray(i * near.kept, (i + 1) * near.kept)));
    return rowSets.get(i);
  }
  const follow = (i) => i > 0 && positions[i] === positions[i - 1] + 1;

  function chainsOf(i) { // runs of neighbours that follow one another as the tokens do
    const found = [];
    for (const row of rowsOf(i)) {
      if (row < 0) continue;
      let first = i, last = i;
      while (follow(first) && rowsOf(first - 1).has(row - (i - first) - 1)) first--;
      while (last + 1 < n && follow(last + 1) && rowsOf(last + 1).has(row + (last - i) + 1)) last++;
      if (last > first) found.push({ first, last, row: row - (i - first) });
    }
    return found.sort((a, b) => b.last - b.first - (a.last - a.first)).slice(0, 3);
  }

  function trainTokens(row, count) {
    const w = windowOf(row), at = windows.offsets[w] + row - windows.starts[w];
    return sentence(windows.tokens.subarray(at, Math.min(at + count, windows.offsets[w] + windows.lengths[w])));
  }

  function writeToken() {
    const panel = byId("token"), i = chosen;
    for (const span of text.querySelectorAll(".chosen, .chain")) span.classList.remove("chosen", "chain");
    panel.replaceChildren();
    if (i < 0) { panel.append(element("p", null, "Choose a token to see what the model and each memory say of it.")); return; }
    spans[i].classList.add("chosen");
    const weights = weightsOf(i), mixed = mixedCandidates(i);
    panel.append(element("div", { class: "word" }, shown(tokens[i])),
      element("div", { class: "where" }, `token ${positions[i].toLocaleString("en")} of the split; gain ${signed(gain[i])} nats`));
    const rows = sources.map((name, s) => ({ cells: [nameOf(name), probability(Math.exp(logProbOf(name)[i])), rankOf(name, i), weights[s].toFixed(3)] }));
    if (lmAlone) rows.unshift({ cells: ["LM", probability(Math.exp(lmAlone[i])), "", ""] });
    const place = mixed.findIndex(({ id }) => id === tokens[i]);
    rows.push({ cells: ["mixture", probability(Math.exp(mixture[i])), place < 0 ? "–" : `≈ ${place + 1}`, ""], target: true });
    if (other) rows.push({ cells: [other.name, probability(Math.exp(other.logProbs[i])), "", ""] });
    const table = tableOf(["", "probability", "rank", "weight"], rows);
    table.id = "probabilities";
    panel.append(element("h3", null, "This token"), table, element("h3", null, "Most probable"));
    const lists = [...sources.map((name) => [nameOf(name), candidatesOf(name, i)]), ["mixture", mixed.slice(0, 10)]];
    panel.append(element("div", { class: "lists" }, ...lists.map(([title, list]) => element("div", null, list.length
      ? tableOf([title, ""], list.map(({ id, p }) => ({ cells: [shown(id), probability(p)], target: id === tokens[i] })))
      : tableOf([title, ""], [{ cells: ["no opinion", ""] }])))));
    if (near) {
      panel.append(element("h3", null, `Nearest stored contexts${near.k > near.kept ? `, ${near.kept} of ${near.k}; shares among these` : ""}`), neighborsTable(i));
      const chains = chainsOf(i);
      if (chains.length) {
        panel.append(element("h3", null, "Neighbours that follow one another"));
        for (const { first, last, row } of chains)
          panel.append(element("p", { class: "chain" }, `${last - first + 1} tokens, rows ${row.toLocaleString("en")} to ${(row + last - first).toLocaleString("en")}: ${trainTokens(row, last - first + 1)}`));
        for (let t = chains[0].first; t <= chains[0].last; t++) spans[t].classList.add("chain");
      }
    }
    if (suffixLengths && suffixLengths[i] > 0) {
      const length = suffixLengths[i], begin = Math.max(0, i - length);
      panel.append(element("h3", null, `Longest suffix in the training text: ${length} tokens`),
        element("p", { id: "suffix" }, `${begin > i - length ? "… " : ""}${sentence(tokens.subarray(begin, i))}`));
      const width = occurrences.length / n;
      const list = Array.from(occurrences.subarray(i * width, (i + 1) * width)).filter((row) => row >= 0).map((row) => {
        const where = around(row);
        return element("li", null, `… ${where.before}${content.joiner}`, element("b", null, where.token), `${content.joiner}${where.after} … (line ${(where.line + 1).toLocaleString("en")})`);
      });
      panel.append(element("ul", null, ...list));
    }
  }

  function choose(i, scroll) {
    if (i < 0 || i >= n) return;
    chosen = i;
    writeToken();
    if (scroll) spans[i].scrollIntoView({ block: "nearest" });
  }

  // -- below the text ---------------------------------------------------------------------------

  function writeSlices() {
    const all = byId("slices"), rows = [];
    slices.forEach((of, s) => of.labels.forEach((label, l) => {
      const found = gainsOf((i) => of.which[i] === l);
      if (found.count) rows.push({ s, l, label, ...found });
    }));
    const widest = Math.max(0.01, ...rows.map((row) => Math.abs(row.mean)));
    all.replaceChildren();
    slices.forEach((of, s) => {
      all.append(element("h3", null, of.name));
      for (const row of rows.filter((each) => each.s === s)) {
        const width = (50 * Math.abs(row.mean)) / widest, pressed = filter && filter.slice === s && filter.label === row.l;
        const bar = element("i", { style: { width: `${width}%`, left: row.mean < 0 ? `${50 - width}%` : "50%", background: `rgba(var(${row.mean < 0 ? "--loss" : "--gain"}), .8)` } });
        all.append(element("button", { type: "button", "aria-pressed": pressed ? "true" : "false", "data-slice": s, "data-label": row.l,
          title: `${row.count} tokens, helped ${percent(row.helped)}, hurt ${percent(row.hurt)}`,
          onclick: () => { filter = pressed ? null : { slice: s, label: row.l }; update(); } },
        element("span", null, row.label), element("span", { class: "bar" }, bar),
        element("span", { class: "figures" }, `${signed(row.mean)} · ${row.count.toLocaleString("en")}`)));
      }
    });
  }

  function writeExtremes() {
    const order = Array.from({ length: n }, (_, i) => i).filter(inFilter).sort((a, b) => gain[b] - gain[a]), all = byId("extremes");
    const line = (i) => element("button", { type: "button", "data-token": i, onclick: () => choose(i, true) },
      element("b", null, signed(gain[i])), element("span", null, `${sentence(tokens.subarray(Math.max(0, i - 4), i))} [${shown(tokens[i])}]`));
    all.replaceChildren(element("h3", null, "gains"), ...order.slice(0, 10).filter((i) => gain[i] > 0).map(line),
      element("h3", null, "losses"), ...order.slice(-10).reverse().filter((i) => gain[i] < 0).map(line));
  }

  function calibrationOf(best) { // by tenths of the probability that was said of the favourite
    const bins = Array.from({ length: 10 }, () => ({ said: 0, right: 0, count: 0 }));
    for (let i = 0; i < n; i++) {
      const favourite = inFilter(i) && best(i);
      if (!favourite) continue;
      const bin = bins[Math.min(9, Math.floor(10 * favourite.p))];
      bin.said += favourite.p; bin.right += favourite.id === tokens[i]; bin.count++;
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
    const curves = [[baseName, "--loss", "4 3", (i) => candidatesOf("lm", i)[0]], ["mixture", "--gain", "none", (i) => mixedCandidates(i)[0]]];
    curves.forEach(([title, ink, dashes, best], c) => {
      const points = calibrationOf(best), stroke = `rgb(var(${ink}))`;
      svg.append(drawn("polyline", { points: points.map((p) => `${x(p.said)},${y(p.right)}`).join(" "), fill: "none", stroke, "stroke-dasharray": dashes, "stroke-width": 2 }));
      for (const p of points) svg.append(drawn("circle", { cx: x(p.said), cy: y(p.right), r: 2 + 5 * Math.sqrt(p.count / n), fill: stroke, "fill-opacity": 0.6 }, drawn("title", {}, `${p.count} tokens: said ${p.said.toFixed(2)}, right ${p.right.toFixed(2)}`)));
      svg.append(drawn("line", { x1: x(0.62), x2: x(0.7), y1: y(0.1 - 0.07 * c) - 4, y2: y(0.1 - 0.07 * c) - 4, stroke, "stroke-dasharray": dashes, "stroke-width": 2 }), drawn("text", { x: x(0.72), y: y(0.1 - 0.07 * c) }, title));
    });
    byId("calibration").replaceChildren(svg);
  }

  // -- all together -----------------------------------------------------------------------------

  let later = 0;
  function update() {
    compute();
    writeTotals();
    writeOutputs();
    colourText();
    writeToken();
    cancelAnimationFrame(later); // what is below may wait for the hand to rest
    later = requestAnimationFrame(() => { writeSlices(); writeExtremes(); writeCalibration(); });
  }

  function writeOutputs() { // in place of all sliders, one of which a hand may hold
    const held = document.activeElement;
    if (held && held.closest("#sliders")) {
      for (const name of memories) byId(`weight-${name}`).previousElementSibling.textContent = settings.weight[name].toFixed(2);
      if (near) { byId("temperature").previousElementSibling.textContent = figure(settings.temperature); byId("k").previousElementSibling.textContent = settings.k; }
      if (near) { if (held.id !== "k") byId("k").value = kSteps.indexOf(settings.k); if (held.id !== "temperature") byId("temperature").value = Math.log2(settings.temperature); }
    } else writeSliders();
  }

  function next(step) {
    for (let i = chosen + step; i >= 0 && i < n; i += step)
      if (inFilter(i) && Math.abs(gain[i]) > LARGE) { choose(i, true); return; }
  }

  document.addEventListener("keydown", (event) => {
    if (/^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName) || event.ctrlKey || event.metaKey || event.altKey) return;
    const does = { ArrowRight: () => choose(chosen + 1, true), ArrowLeft: () => choose(Math.max(0, chosen - 1), true), n: () => next(1), p: () => next(-1),
      Escape: () => { filter = null; update(); } }[event.key];
    if (does) { event.preventDefault(); does(); }
  });
  text.addEventListener("click", (event) => { const span = event.target.closest("span"); if (span) choose(span.number, false); });
  byId("reset").addEventListener("click", () => { settings = evaluated(); filter = null; update(); });
  const select = byId("colour");
  for (const [name, [title]] of Object.entries(columns)) select.append(element("option", { value: name }, title));
  select.addEventListener("change", () => { colour = select.value; colourText(); });
  writeText();
  update();
})();
