// All together: what follows from a change of the settings, the keyboard, and the beginning.
let round = 0;
function later(...steps) { // after what has changed is seen, one by one, so that a hand never waits for all
  const mine = ++round;
  const step = () => { if (mine === round && steps.length) { steps.shift()(); setTimeout(step); } };
  requestAnimationFrame(() => setTimeout(step));
}

const overview = [writeSlices, writeExtremes, writeCalibration];
function update() {
  compute();
  writeTotals();
  writeOutputs();
  writeToken();
  colourText();
  later(...overview);
}

function next(step) {
  const column = judged();
  for (let i = chosen + step; i >= 0 && i < n; i += step)
    if (inFilter(i) && Math.abs(column[i]) > LARGE) { choose(i, true); return; }
}

function listen() {
  document.addEventListener("keydown", (event) => {
    if (/^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName) || event.ctrlKey || event.metaKey || event.altKey) return;
    const does = { ArrowRight: () => choose(chosen + 1, true), ArrowLeft: () => choose(Math.max(0, chosen - 1), true), n: () => next(1), p: () => next(-1),
      Escape: () => { filter = null; update(); } }[event.key];
    if (does) { event.preventDefault(); does(); }
  });
  text.addEventListener("click", (event) => { const span = event.target.closest("span"); if (span) choose(Number(span.id.slice(1)), false); });
  byId("reset").addEventListener("click", () => { settings = evaluated(); filter = null; update(); });
  const select = byId("colour");
  for (const [name, [title]] of Object.entries(columns)) select.append(element("option", { value: name, ...(name === colour ? { selected: "" } : {}) }, title));
  select.addEventListener("change", () => { colour = select.value; colourText(); later(...overview); });
}

// The text and its totals are seen at once, all else when the whole page is read.
writeText();
compute();
writeTotals();
colourText();
document.addEventListener("DOMContentLoaded", () => { listen(); writeSliders(); writeToken(); later(...overview); });
