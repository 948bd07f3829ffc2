// A token that is chosen: what each source says of it, its neighbours, and where its context stood.
function windowOf(row) { // which stretch of the training text holds a row
  let low = 0, high = windows.starts.length - 1;
  while (low < high) { const middle = (low + high + 1) >> 1; if (windows.starts[middle] <= row) low = middle; else high = middle - 1; }
  return low;
}

let offsets = null; // of each stretch in the tokens of all
function offsetOf(w) {
  if (!offsets) {
    offsets = new Int32Array(windows.starts.length);
    for (let i = 1; i < offsets.length; i++) offsets[i] = offsets[i - 1] + windows.lengths[i - 1];
  }
  return offsets[w];
}

function around(row) { // the text before a row of the training text, its token, the text after, its line
  const w = windowOf(row), at = row - windows.starts[w], begin = offsetOf(w), end = begin + windows.lengths[w];
  const place = begin + at, first = Math.max(begin, place - content.context);
  let line = windows.lines[w];
  for (let i = begin; i < place; i++) if (words[windows.tokens[i]] === "\n") line++;
  return {
    before: sentence(windows.tokens.subarray(first, place)), token: shown(windows.tokens[place]),
    after: sentence(windows.tokens.subarray(place + 1, Math.min(end, place + 1 + content.following))), line,
  };
}

function trainTokens(row, count) {
  const w = windowOf(row), at = offsetOf(w) + row - windows.starts[w];
  return sentence(windows.tokens.subarray(at, Math.min(at + count, offsetOf(w) + windows.lengths[w])));
}

// -- its neighbours -------------------------------------------------------------------------------

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
    element("td", { class: "number" }, `${grouped(group.row)}`, element("br"), `line ${grouped(group.line + 1)}`)));
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

// -- the panel ------------------------------------------------------------------------------------

function tableOf(head, rows) {
  const cells = (tag, row) => row.map((cell, c) => element(tag, c && typeof cell === "string" ? { class: "number" } : null, cell));
  return element("table", null, element("thead", null, element("tr", null, ...cells("th", head))),
    element("tbody", null, ...rows.map(({ cells: row, target }) => element("tr", target ? { class: "target" } : null, ...cells("td", row)))));
}

function probabilitiesOf(i, mixed) { // of the token, by every source of both results
  const place = mixed.findIndex(({ id }) => id === tokens[i]);
  const said = (name) => (other && other.log_probs[name] ? probability(Math.exp(other.log_probs[name][i])) : "");
  const ofBase = (name) => (other && other.base === name ? said("lm") : ""); // two models may be compared
  const rows = sources.map((name, s) => [nameOf(name), probability(Math.exp(logProbOf(name)[i])), rankOf(name, i), weights[s][i].toFixed(3),
    name === "lm" ? ofBase(baseName) : said(name)]);
  if (content.lm_alone) rows.unshift(["LM", probability(Math.exp(content.lm_alone[i])), "", "", ofBase("LM")]);
  else if (ofBase("GNN-LM")) rows.push(["GNN-LM", "", "", "", said("lm")]);
  const others = other ? Object.keys(other.log_probs).filter((name) => name !== "mixture" && !sources.includes(name)) : [];
  for (const name of others) rows.push([name, "", "", "", said(name)]);
  const known = isEvaluated() && content.ranks ? content.ranks[i] : 0; // of all tokens; the lists know only some
  const rank = known > 0 ? String(known) : known < 0 ? `≥ ${-known}` : place < 0 ? "–" : `≈ ${place + 1}`;
  rows.push(["mixture", probability(Math.exp(mixture[i])), rank, "", said("mixture")]);
  const width = other ? 5 : 4, table = tableOf(["", "probability", "rank", "weight", other ? other.name : ""].slice(0, width),
    rows.map((cells, r) => ({ cells: cells.slice(0, width), target: r === rows.length - 1 })));
  table.id = "probabilities";
  return table;
}

function writeToken() {
  const panel = byId("token"), i = chosen;
  chain = null;
  panel.replaceChildren();
  if (i < 0) { panel.append(element("p", null, "Choose a token to see what the model and each memory say of it.")); return; }
  const mixed = mixedCandidates(i), over = other ? `; over ${other.name} ${signed(difference[i])}` : "";
  panel.append(element("div", { class: "word" }, shown(tokens[i])),
    element("div", { class: "where" }, `token ${grouped(positions[i])} of the split; gain ${signed(gain[i])} nats${over}`),
    element("h3", null, "This token"), probabilitiesOf(i, mixed), element("h3", null, "Most probable"));
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
        panel.append(element("p", { class: "chain" }, `${last - first + 1} tokens, rows ${grouped(row)} to ${grouped(row + last - first)}: ${trainTokens(row, last - first + 1)}`));
      chain = chains[0];
    }
  }
  if (content.suffix_lengths && content.suffix_lengths[i] > 0) {
    const length = content.suffix_lengths[i], begin = Math.max(0, i - length);
    panel.append(element("h3", null, `Longest suffix in the training text: ${length} tokens`),
      element("p", { id: "suffix" }, `${begin > i - length ? "… " : ""}${sentence(tokens.subarray(begin, i))}`));
    const places = content.occurrences, width = places.length / n;
    const list = Array.from(places.subarray(i * width, (i + 1) * width)).filter((row) => row >= 0).map((row) => {
      const where = around(row);
      return element("li", null, `… ${where.before}${content.joiner}`, element("b", null, where.token), `${content.joiner}${where.after} … (line ${grouped(where.line + 1)})`);
    });
    panel.append(element("ul", null, ...list));
  }
}

function choose(i, scroll) {
  if (i < 0 || i >= n) return;
  chosen = i;
  writeToken();
  mark();
  if (scroll) spans[i].scrollIntoView({ block: "nearest" });
}
