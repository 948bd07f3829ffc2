// What a page holds, and the mixture of it under settings: numbers alone, nothing that is seen.
// An array stands in an element of its own and is unpacked when it is first read, as most are read for a
// chosen token only; those elements stand behind the script and are there when all is read.
const ARRAYS = { f8: Float64Array, f4: Float32Array, i4: Int32Array, u1: Uint8Array, u2: Uint16Array, u4: Uint32Array };
const LARGE = 1, MARGIN = 0.01; // nats: a large gain; what counts as helped or hurt

function unpack(packed) {
  const data = document.getElementById(packed.element).textContent;
  let bytes;
  if (Uint8Array.fromBase64) bytes = Uint8Array.fromBase64(data);
  else {
    const raw = atob(data);
    bytes = new Uint8Array(raw.length);
    for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
  }
  return new ARRAYS[packed.type](bytes.buffer);
}

function lazily(value) { // the same, with arrays for what is packed
  if (Array.isArray(value)) return typeof value[0] === "object" ? value.map(lazily) : value;
  if (value === null || typeof value !== "object") return value;
  const found = {};
  for (const [name, of] of Object.entries(value)) {
    if (!of || of.element === undefined) { found[name] = lazily(of); continue; }
    let array = null;
    Object.defineProperty(found, name, { enumerable: true, get: () => (array ??= unpack(of)) });
  }
  return found;
}

const content = lazily(JSON.parse(document.getElementById("content").textContent));
const { words, tokens, positions, sources, slices, candidates, windows, other, neighbors: near } = content;
const n = tokens.length, memories = sources.slice(1), logProbs = content.log_probs;
const baseName = content.lm_alone ? "GNN-LM" : "LM";
const nameOf = (source) => (source === "lm" ? baseName : source);

// -- settings and what follows from them ----------------------------------------------------------

const mean = (column) => column.reduce((sum, x) => sum + x, 0) / column.length;
function evaluated() {
  return {
    asEvaluated: true,
    weight: Object.fromEntries(memories.map((name) => [name, mean(content.weights[name])])),
    on: Object.fromEntries(memories.map((name) => [name, true])),
    temperature: near ? near.temperature : 1,
    k: near ? near.k : 0,
  };
}
let settings = evaluated(), filter = null;
let knn = null;
const weights = sources.map(() => new Float64Array(n)); // of all sources; those of a token sum to one
const mixture = new Float64Array(n), gain = new Float64Array(n); // gain over the model
const difference = other && new Float64Array(n), otherGain = other && new Float64Array(n);
if (other) for (let i = 0; i < n; i++) otherGain[i] = other.log_probs.mixture[i] - other.log_probs.lm[i];

const isEvaluated = () => settings.asEvaluated && (!near || knnIsStored()) && memories.every((name) => settings.on[name]);
const knnIsStored = () => settings.temperature === near.temperature && settings.k === near.k;

function sharesOf(i) { // softmax of the scores of the nearest k
  const k = Math.min(settings.k, near.kept), shares = new Float64Array(k);
  let highest = -Infinity, sum = 0;
  for (let j = 0, at = i * near.kept; j < k; j++, at++) { // one that stands for several entries has the votes of all
    shares[j] = near.scores[at] / settings.temperature + (near.counts ? Math.log(near.counts[at]) : 0);
    if (shares[j] > highest) highest = shares[j];
  }
  if (highest === -Infinity) return shares.fill(0);
  for (let j = 0; j < k; j++) sum += shares[j] = Math.exp(shares[j] - highest);
  for (let j = 0; j < k; j++) shares[j] /= sum;
  return shares;
}

function knnLogProbs() {
  if (knnIsStored()) return logProbs.knn;
  const found = new Float64Array(n), values = near.values;
  for (let i = 0; i < n; i++) {
    const shares = sharesOf(i);
    let p = 0;
    for (let j = 0; j < shares.length; j++) if (values[i * near.kept + j] === tokens[i]) p += shares[j];
    found[i] = Math.log(p);
  }
  return found;
}

const logProbOf = (name) => (name === "knn" && near ? knn : logProbs[name]);

function weigh() {
  const sums = new Float64Array(n), rest = 1 - memories.reduce((sum, name) => sum + settings.weight[name], 0);
  sources.forEach((name, s) => {
    const column = weights[s];
    if (name !== "lm" && !settings.on[name]) column.fill(0);
    else if (settings.asEvaluated) column.set(content.weights[name]);
    else column.fill(name === "lm" ? Math.max(0, rest) : settings.weight[name]);
    for (let i = 0; i < n; i++) sums[i] += column[i];
  });
  weights.forEach((column, s) => { for (let i = 0; i < n; i++) column[i] = sums[i] > 0 ? column[i] / sums[i] : Number(s === 0); });
}

function compute() {
  if (near) knn = knnLogProbs();
  weigh();
  mixture.fill(0);
  sources.forEach((name, s) => {
    const column = weights[s], of = logProbOf(name);
    for (let i = 0; i < n; i++) if (column[i] > 0) mixture[i] += column[i] * Math.exp(of[i]);
  });
  const lm = logProbs.lm, others = other && other.log_probs.mixture;
  for (let i = 0; i < n; i++) {
    mixture[i] = Math.log(mixture[i]);
    gain[i] = mixture[i] - lm[i];
    if (other) difference[i] = mixture[i] - others[i];
  }
}

// -- sums over tokens -----------------------------------------------------------------------------

const inFilter = (i) => !filter || slices[filter.slice].which[i] === filter.label;

function perplexity(column) { // over the tokens of the chosen class
  let sum = 0, count = 0;
  for (let i = 0; i < n; i++) if (inFilter(i)) { sum -= column[i]; count++; }
  return Math.exp(sum / count);
}

function gainsOf(column, which) {
  let sum = 0, helped = 0, hurt = 0, count = 0;
  for (let i = 0; i < n; i++) {
    if (!which(i)) continue;
    count++; sum += column[i];
    if (column[i] > MARGIN) helped++; else if (column[i] < -MARGIN) hurt++;
  }
  return { mean: count ? sum / count : 0, helped: helped / count, hurt: hurt / count, count };
}

// -- candidates -----------------------------------------------------------------------------------

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
  const sums = new Map();
  sources.forEach((name, s) => {
    const weight = weights[s][i];
    if (weight > 0) for (const { id, p } of candidatesOf(name, i)) sums.set(id, (sums.get(id) || 0) + weight * p);
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

const sums = new Float64Array(words.length + 1); // of each word, and of none
function favouriteOf(i) { // of the mixture; the first of `mixedCandidates`, without a list
  const seen = [];
  const add = (id, p) => { if (p > 0) { if (sums[id] === 0) seen.push(id); sums[id] += p; } };
  sources.forEach((name, s) => {
    const weight = weights[s][i], of = candidates[name];
    if (weight === 0) return;
    if (name === "knn" && near && !knnIsStored()) sharesOf(i).forEach((share, j) => add(near.values[i * near.kept + j], weight * share));
    else for (let j = i * of.width; j < (i + 1) * of.width; j++) add(of.ids[j], weight * of.probs[j]);
  });
  add(tokens[i], Number.MIN_VALUE);
  sums[tokens[i]] = Math.exp(mixture[i]);
  let best = seen[0];
  for (const id of seen) if (sums[id] > sums[best]) best = id;
  const found = { id: best, p: sums[best] };
  for (const id of seen) sums[id] = 0;
  return found;
}
