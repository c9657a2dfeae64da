// The studio's page: asks the server, keeps what is chosen, and lets the linked views draw it.
import strip from "/web/strip.js";
import * as views from "/web/views.js";

const $ = id => document.getElementById(id);
const make = (tag, name, text, parent) => { const node = document.createElement(tag); if (name) node.className = name; if (text != null) node.textContent = text; parent?.append(node); return node; };
const plural = n => n === 1 ? "1 loop" : n + " loops";
let library = { models: [], traces: [], runs: [], grids: [] }, sides = [], main = null;
let view = "lens", choice = { mode: "probability", flat: "2-D", unit: "loops" };

function say(text) { $("message").textContent = text || ""; $("message").hidden = !text; }
async function ask(path, body) {
  const answer = await fetch(path, body ? { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body) } : {});
  if (!answer.ok) throw new Error((await answer.json().catch(() => ({}))).error || `the studio answered ${answer.status}`);
  return answer;
}
const quietly = act => async (...given) => { try { say(""); return await act(...given); } catch (error) { say(error.message || String(error)); } };

// What a strip talks to: the part of anywidget's model that it needs.
function bag(values) {
  const heard = {};
  return { get: name => values[name], save_changes() {},
    set(name, value) { if (values[name] === value) return; values[name] = value; (heard[name] || []).slice().forEach(act => act()); },
    on(event, act) { (heard[event.slice(7)] ??= []).push(act); } };
}

// One answer: its strip, its threshold, what is chosen in it.
class Side {
  constructor(box) {
    this.box = box; this.turn = 0; this.trace = null; this.selected = -1; this.at = null; this.loops = [];
    box.replaceChildren();
    this.dials = make("div", "dials", null, box);
    this.title = make("h2", "", "Type a prompt, or open a trace", box);
    this.readout = make("div", "readout", null, box);
    this.threshold = make("label", "threshold", null, box); this.threshold.hidden = true;
    make("span", "", "threshold, replay", this.threshold);
    this.slider = make("input", "", null, this.threshold);
    Object.assign(this.slider, { type: "range", min: 0, max: 200, step: 1 }); this.slider.setAttribute("aria-label", "exit threshold, replay");
    this.value = make("output", "", "", this.threshold);
    this.reset = make("button", "", "As recorded", this.threshold); this.reset.type = "button";
    this.legend = make("div", "legend", null, box); this.legend.setAttribute("aria-live", "polite");
    this.model = bag({ texts: [], loops: [], max: 1, faint: [], labels: null, selected: -1, hovered: -1 });
    strip.render({ model: this.model, el: box });
    this.model.on("change:selected", () => this.choose(this.model.get("selected")));
    this.model.on("change:hovered", () => { const i = this.model.get("hovered"); if (this.selected < 0 && this === main) inspect(this, i); });
    this.slider.oninput = () => this.set(Number(this.slider.value));
    this.reset.onclick = () => this.set(this.trace.curve?.home ?? null, true);
    box.addEventListener("pointerdown", () => lead(this));
  }
  begin(title) { this.turn++; this.trace = null; this.title.textContent = title; this.threshold.hidden = true; this.readout.replaceChildren(); this.model.set("selected", -1);
    for (const [name, value] of [["texts", []], ["loops", []], ["faint", []], ["labels", null]]) this.model.set(name, value); this.legend.replaceChildren(); }
  grow(texts, loops, max, faint) { this.model.set("max", max); this.model.set("loops", loops); this.model.set("faint", faint); this.model.set("texts", texts); this.count(loops, max); }
  show(trace) {
    this.trace = trace;
    this.title.textContent = trace.title;
    this.threshold.hidden = !trace.curve;
    this.model.set("labels", trace.labels); this.model.set("faint", []); this.model.set("max", trace.max); this.model.set("texts", trace.texts);
    this.set(trace.curve?.home ?? null, true);
  }
  // The rule of LoopTrace.replay; the CDF comes in ten-thousandths.
  replay(at) { const reach = at * 50; return this.trace.cdf.map((row, i) => { const n = at < 200 ? row.findIndex(c => c >= reach) : -1; return n >= 0 ? n + 1 : row.length || this.trace.loops[i]; }); }
  set(at, recorded = false) {
    const { trace } = this;
    this.at = at;
    this.loops = recorded || at == null ? trace.loops : this.replay(at);
    this.model.set("loops", this.loops);
    this.slider.value = at ?? (trace.recorded ?? 1) * 200;
    this.value.textContent = at == null ? "as recorded" : at === 200 ? "1, never early" : (at / 200).toFixed(3);
    this.reset.hidden = at === (trace.curve?.home ?? null);
    this.count(this.loops, trace.max);
    this.figures();
    if (this === main) { remember(); redraw(recorded ? 30 : 150); }
  }
  figures() {
    const { trace, at } = this, curve = trace.curve, ran = this.loops.filter(n => n), mean = ran.reduce((a, b) => a + b, 0) / ran.length;
    const facts = [[ran.length ? mean.toFixed(2) : "–", `mean loops of ${trace.max}`]];
    if (curve?.loss && at != null) { const gap = curve.mixed ? curve.loss[at] - curve.mixed[at] : null;
      facts.push([curve.loss[at].toFixed(3), gap == null ? "loss, nats" : Math.abs(gap) < .0005 ? "loss, equal to random mixing" : `loss, ${Math.abs(gap).toFixed(3)} ${gap < 0 ? "below" : "above"} random mixing`]); }
    if (this.speed) facts.push([this.speed.toFixed(0), "tokens/s"]);
    facts.push([trace.rule, `exit rule, planes ${trace.policy}`]);
    this.readout.replaceChildren();
    for (const [number, word] of facts) { const box = make("div", "", null, this.readout); make("b", "", number, box); make("small", "", word, box); }
  }
  count(loops, R) {
    const counts = new Array(R + 1).fill(0), wide = Math.ceil(R / 8);
    for (const n of loops) counts[n]++;
    this.legend.replaceChildren();
    for (let n = 1; n <= R; n += wide) {
      const last = Math.min(n + wide - 1, R), entry = make("span", "", null, this.legend);
      make("i", "lw-swatch", "", entry).style.setProperty("--n", R > 1 ? ((n + last) / 2 - 1) / (R - 1) : 0);
      entry.append((last > n ? n + "–" + plural(last) : plural(n)) + " · " + counts.slice(n, last + 1).reduce((a, b) => a + b));
    }
    if (counts[0]) make("span", "", "given · " + counts[0], this.legend);
  }
  choose(i) { this.selected = i; this.model.set("selected", i); lead(this); if (this === main) { inspect(this, i); remember(); redraw(); } }
}

function lead(side) { if (main === side || !side.trace) return; main = side; remember(); redraw(); }

// Views
let queued = 0;
// After the tints are painted, and once for many changes: a drag of the threshold must never wait for a figure.
function redraw(delay = 30) { clearTimeout(queued); queued = setTimeout(draw, delay); }
function draw() {
  const trace = main?.trace;
  $("views").hidden = !trace;
  if (!trace || !window.Plotly) return;
  const options = { lens: ["mode", views.modes(trace)], path: ["flat", [["2-D", "plane"], ["3-D", "space"]]], quality: ["unit", views.units(trace)], exits: ["", []] }[view];
  $("choices").replaceChildren();
  for (const [value, word] of options[1]) {
    const button = make("button", "", word, $("choices")); button.type = "button";
    button.setAttribute("aria-pressed", String(choice[options[0]] === value));
    button.onclick = () => { choice[options[0]] = value; remember(); redraw(); };
  }
  const missing = { path: !trace.paths, exits: !trace.cdf, quality: !trace.depths, lens: !views.modes(trace).length }[view];
  $("plot").hidden = missing;
  $("caption").textContent = missing ? { path: "This trace was recorded without states; run its prompt here to see where they go.", exits: `No threshold to drag: this model's signal is ${trace.kind || "none"}.`,
    quality: "This trace has no losses at every loop.", lens: "This trace was recorded without predictions." }[view] : views[view]($("plot"), trace, main, choice);
  $("plot").setAttribute("aria-label", $("caption").textContent);
  if (!missing && !$("plot").wired && $("plot").on) { $("plot").wired = true;
    $("plot").on("plotly_relayout", change => { const y = change["shapes[0].y0"]; if (view === "exits" && y != null) main.set(Math.round(200 * Math.min(1, Math.max(0, y)))); });
    $("plot").on("plotly_click", event => { if (view === "lens") main.choose(event.points[0].x); }); }
}
function inspect(side, i) {
  const box = $("inspector"), { trace } = side;
  box.replaceChildren();
  if (!trace || i < 0 || i >= trace.labels.length) return;
  const ran = side.loops[i];
  make("h2", "", trace.labels[i], box);
  make("p", "note", `token ${i}, id ${trace.ids[i]}, ${ran ? `${ran} of ${plural(trace.max)}` : "given, no row emitted it"}`, box);
  if (!trace.signals && !trace.top) return;
  const table = make("table", "", null, make("div", "scroll", null, box)), head = make("tr", "", null, make("thead", "", null, table)), body = make("tbody", "", null, table);
  const columns = [["signals", trace.kind === "hazard" ? "stop here" : trace.kind, 1], ["cdf", "left by now", 1e-4], ["losses", "loss", 1], ["entropy", "entropy", 1], ["kl", "KL to final", 1]].filter(([name]) => trace[name]);
  for (const word of ["loop", ...columns.map(c => c[1]), "top five"]) make("th", "", word, head).scope = "col";
  for (let r = 0; r < trace.max; r++) {
    if (columns.every(([name]) => trace[name][i][r] == null) && !trace.top?.[i][r]?.length) continue;
    const row = make("tr", ran && r >= ran ? "after" : "", null, body);
    make("span", "lw-swatch", r + 1, make("td", "", null, row)).style.setProperty("--n", trace.max > 1 ? r / (trace.max - 1) : 0);
    for (const [name, , unit] of columns) { const value = trace[name][i][r]; make("td", "", value == null ? "" : (value * unit).toFixed(3), row); }
    const guesses = make("td", "", null, row);
    (trace.top?.[i][r] || []).forEach((word, k) => { const said = trace.word_ids[word] === trace.ids[i], cell = make(said ? "b" : "span", said ? "said" : "", null, guesses);
      make("code", "", trace.words[word], cell); cell.append(` ${trace.probs[i][r][k].toFixed(2)}   `); });
  }
}

// Asking
function settings(side) {
  const effort = side.effort.value, common = { max_tokens: Number($("count").value), temperature: Number($("temperature").value), seed: Number($("seed").value) };
  return effort ? { ...common, effort } : { ...common, exit: $("rule").value.trim() || null, max_loops: Number($("loops").value) || null };
}
function efforts(select, name) {
  const facts = library.models.find(m => m.name === name), kept = select.value;
  select.replaceChildren();
  for (const rung of facts?.ladder.rungs || []) make("option", "", `${rung.effort}: ${rung.exit ? rung.exit + ", at most " : ""}${plural(rung.max_loops)}${rung.same_as ? ` (as ${rung.same_as})` : ""}${facts.ladder.measured ? "" : " · not measured"}`, select).value = rung.effort;
  make("option", "", "by hand: rule and loops", select).value = "";
  select.value = [...select.options].some(o => o.value === kept) && kept ? kept : "";
  if (facts?.signal === "hazard" && !$("rule").value) $("rule").value = "hazard:0.6";
}
let stop = null;
async function write(side, name, prompt, kept, signal) {
  side.begin(`${name} is writing…`);
  const answer = await fetch("/api/generate", { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify({ model: name, prompt, settings: kept }), signal });
  if (!answer.ok) throw new Error((await answer.json()).error);
  const texts = [], loops = [], faint = new Map(); let max = 1, given = 0, rest = "", key = null, told = false, drawn = 0;
  const paint = () => { drawn = 0; const pale = [...faint.keys()].filter(i => i >= loops.length - given).sort((a, b) => a - b);
    side.grow([...texts, ...pale.map(i => faint.get(i).text)], [...loops, ...pale.map(i => faint.get(i).loops)], max, pale.map((_, k) => texts.length + k)); };
  for await (const bytes of answer.body.pipeThrough(new TextDecoderStream())) {
    rest += bytes;
    const events = rest.split("\n\n"); rest = events.pop();
    for (const event of events) {
      const data = JSON.parse(event.slice(6));
      if (data.given) { texts.push(...data.given); loops.push(...data.given.map(() => 0)); given = data.given.length; max = data.max; }
      else if (data.token) { const t = data.token;
        if (t.provisional) faint.set(t.index, t); else { faint.delete(t.index); texts.push(t.text); loops.push(t.loops); } }
      else if (data.done) { key = data.done; side.speed = data.tokens_per_second; told = true; }
    }
    if (!drawn) drawn = requestAnimationFrame(paint);
  }
  cancelAnimationFrame(drawn);
  if (!told) throw new Error("the answer broke off; look at the terminal that runs the studio");
  return key;
}
async function open(side, key) { const turn = ++side.turn, trace = await (await ask(`/api/traces/${key}`)).json(); if (turn !== side.turn) return; side.show(trace); main = side; if (side.selected < 0) { const most = side.trace.loops.indexOf(Math.max(...side.trace.loops)); if (most >= 0) side.choose(most); } redraw(); await traces(); }
async function traces() { library = await (await ask("/api/library")).json(); const select = $("traces"); select.replaceChildren(); make("option", "", "a trace…", select).value = ""; for (const one of library.traces) make("option", "", `${one.key}. ${one.title}`, select).value = one.key; $("opened").hidden = !library.traces.length; }
const busy = yes => { for (const id of ["go", "read"]) $(id).disabled = yes; $("stop").hidden = !yes; };

$("ask").onsubmit = quietly(async event => {
  event.preventDefault();
  const prompt = $("prompt").value;
  if (!prompt) throw new Error("type a prompt first");
  stop = new AbortController(); busy(true);
  try { for (const side of sides) { const key = await write(side, side.name.value, prompt, settings(side), stop.signal); await open(side, key); } if (sides[1]) main = sides[0]; redraw(); }
  catch (error) { if (error.name !== "AbortError") throw error; say("stopped"); }
  finally { busy(false); }
});
$("read").onclick = quietly(async () => {
  if (!$("prompt").value) throw new Error("type a text first");
  busy(true);
  try { for (const side of sides) { side.begin("reading…"); side.speed = null; const { key } = await (await ask("/api/read", { model: side.name.value, text: $("prompt").value, settings: settings(side) })).json(); await open(side, key); } }
  finally { busy(false); }
});
$("stop").onclick = () => stop?.abort();
$("prompt").onkeydown = event => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("ask").requestSubmit(); };
$("traces").onchange = quietly(async () => { if ($("traces").value) await open(sides[0], $("traces").value); });
const byHand = () => document.querySelectorAll(".rule").forEach(box => { box.hidden = sides.every(side => side.effort.value); });
function wire(side, name, effort) {
  side.name = name; side.effort = effort;
  for (const model of library.models) make("option", "", model.name, name).value = model.name;
  name.onchange = () => { efforts(effort, name.value); byHand(); };
  effort.onchange = byHand;
  efforts(effort, name.value); byHand();
}
$("beside").onclick = () => {
  const two = sides.length === 1;
  $("beside").setAttribute("aria-pressed", String(two)); $("sides").classList.toggle("two", two);
  if (two) {
    const side = new Side(make("section", "side card", null, $("sides")));
    sides.push(side);
    const labelled = word => { const label = make("label", "", word, side.dials); return make("select", "", null, label); };
    wire(side, labelled("Model"), labelled("Effort"));
    if (library.models.length > 1) { side.name.selectedIndex = 1; side.name.onchange(); } else side.effort.selectedIndex = 0;
    byHand();
  } else { const side = sides.pop(); side.box.remove(); if (main === side) main = sides[0]; byHand(); redraw(); }
};

// Tabs, export, links
document.querySelectorAll("[data-room]").forEach(tab => tab.onclick = () => room(tab.dataset.room));
document.querySelectorAll("[data-view]").forEach(tab => tab.onclick = () => { view = tab.dataset.view; for (const other of document.querySelectorAll("[data-view]")) other.setAttribute("aria-selected", String(other === tab)); Plotly.purge($("plot")); $("plot").wired = false; remember(); redraw(); });
document.querySelectorAll("[role=tablist]").forEach(list => list.onkeydown = event => { const tabs = [...list.querySelectorAll("[role=tab]")], here = tabs.indexOf(document.activeElement), way = { ArrowRight: 1, ArrowLeft: -1 }[event.key]; if (way && here >= 0) { const to = tabs[(here + way + tabs.length) % tabs.length]; to.focus(); to.click(); } });
function room(name) { for (const tab of document.querySelectorAll("[data-room]")) { const yes = tab.dataset.room === name; tab.setAttribute("aria-selected", String(yes)); $(tab.dataset.room).hidden = !yes; } if (name === "run") showRun(); if (name === "grid") showGrid(); if (name === "text") redraw(); }
$("theme").onclick = () => { const style = document.documentElement.style, dark = (style.colorScheme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark"; style.colorScheme = dark ? "light" : "dark"; redraw(); if (!$("run").hidden) showRun(); if (!$("grid").hidden) drawTick(); };
$("png").onclick = quietly(async () => { if ($("plot").hidden) throw new Error("there is nothing drawn to export"); const box = $("plot"), kept = box.layout.paper_bgcolor; await Plotly.relayout(box, { paper_bgcolor: views.colour("--card") });
  try { await Plotly.downloadImage(box, { format: "png", width: 1400, height: 700, scale: 2, filename: `loopwise-${view}` }); } finally { await Plotly.relayout(box, { paper_bgcolor: kept }); } });
$("html").onclick = () => { if (main?.trace) Object.assign(document.createElement("a"), { href: `/api/traces/${main.trace.key}/page`, download: "" }).click(); };
$("link").onclick = quietly(async () => { remember(); await navigator.clipboard.writeText(location.href); say("The link to this selection is on the clipboard; it works while the studio keeps the trace."); });
function remember() { if (!main?.trace) return; const kept = new URLSearchParams({ trace: main.trace.key, view, token: main.selected, ...choice }); if (main.at != null) kept.set("at", main.at); history.replaceState(null, "", "#" + kept); }
async function recall() {
  const kept = new URLSearchParams(location.hash.slice(1)), key = kept.get("trace");
  if (!key || !library.traces.some(one => one.key === key)) return false;
  for (const name of Object.keys(choice)) if (kept.get(name)) choice[name] = kept.get(name);
  if (["lens", "path", "exits", "quality"].includes(kept.get("view"))) view = kept.get("view");
  for (const tab of document.querySelectorAll("[data-view]")) tab.setAttribute("aria-selected", String(tab.dataset.view === view));
  const at = kept.get("at"), token = Number(kept.get("token") ?? -1);
  await open(sides[0], key);
  if (at != null && main.trace.curve) main.set(Number(at));
  main.choose(token);
  return true;
}

// Runs
const showRun = quietly(async () => {
  if (!window.Plotly) return;
  const name = $("runs").value;
  if (!name) { $("run-note").textContent = "No run is open. Type: loopwise studio RUN_FOLDER"; return; }
  const run = await (await ask(`/api/runs/${encodeURIComponent(name)}`)).json();
  $("run-note").textContent = `${run.steps.toLocaleString()} steps, ${run.stages.join(", then ")}`;
  $("panels").replaceChildren();
  const boxes = run.panels.map(() => make("div", "plot", null, $("panels"))); // all of them first: each is as wide as its column
  for (const [k, panel] of run.panels.entries()) {
    Plotly.newPlot(boxes[k], panel.lines.map(line => ({ mode: line.x.length > 1 ? "lines" : "markers", x: line.x, y: line.y, name: line.name })), views.layout({ title: { text: panel.title, x: 0, xanchor: "left", font: { size: 14 } }, margin: { l: 58, r: 10, t: 40, b: 44 },
      legend: { x: 1, xanchor: "right", y: 1 }, showlegend: panel.lines.length > 1, xaxis: { title: { text: "step" } }, yaxis: { title: { text: panel.unit } } }), views.config);
  }
});
$("runs").onchange = showRun; $("again").onclick = showRun;

// Grids: { title, problems: [{ rows, columns, problem: [cell], target: [cell]|null, answers: [tick][cell], attention: [tick][cell]|null, certainty: [tick]|null, difficulty }] }
let grid = null, ticking = 0;
const showGrid = quietly(async () => {
  if (!window.Plotly) return;
  const name = $("grids").value;
  if (!name) { $("board-note").textContent = "No grid is open. Make one with `loopwise study grid`, then type: loopwise studio grid.json"; return; }
  grid = await (await ask(`/api/grids/${encodeURIComponent(name)}`)).json();
  $("problems").replaceChildren();
  grid.problems.forEach((one, k) => make("option", "", `${k + 1}${one.difficulty == null ? "" : ` (difficulty ${one.difficulty})`}`, $("problems")).value = k);
  pickProblem();
});
const problem = () => grid.problems[Number($("problems").value)];
function pickProblem() { $("tick").max = problem().answers.length; $("tick").value = 1; $("overlay-label").hidden = !problem().attention; drawTick(); }
function drawTick() {
  if (!grid) return;
  const one = problem(), t = Number($("tick").value), answer = one.answers[t - 1], look = $("overlay").value === "attention" && one.attention ? one.attention[t - 1] : null;
  const board = $("board"); board.style.gridTemplateColumns = `repeat(${one.columns}, 1fr)`; board.style.aspectRatio = `${one.columns} / ${one.rows}`;
  const strongest = look ? Math.max(...look) : 1;
  board.replaceChildren();
  one.problem.forEach((cell, i) => {
    const kind = { "#": "wall", S: "start", G: "goal" }[cell] || (cell && cell !== "." && cell !== " " ? "given" : ""), box = make("div", kind, null, board), said = answer[i];
    const word = kind === "given" || kind === "start" || kind === "goal" ? cell : said === true || said === false ? "" : said ?? "";
    box.textContent = kind === "wall" ? "" : word;
    if (!kind && typeof said === "boolean") box.classList.toggle("on", said);
    if (!kind && one.target) { const right = one.target[i] === said; box.classList.add(right ? "fits" : "misses"); if (!right && typeof said !== "boolean" && said) box.classList.add("no"); if (one.target[i] === true) box.classList.add("yes"); }
    if (look) { box.classList.add("looked"); box.style.setProperty("--a", .75 * look[i] / strongest); }
  });
  const wrong = one.target ? one.problem.filter((cell, i) => !["#", "S", "G"].includes(cell) && one.target[i] != null && one.target[i] !== answer[i]).length : null;
  $("tick-note").textContent = `tick ${t} of ${one.answers.length}`;
  $("board-note").textContent = `${grid.title}. ${wrong == null ? "" : wrong ? `${wrong} cells differ from the solution.` : "Every cell is right."} ${one.certainty ? `Certainty ${one.certainty[t - 1].toFixed(3)}.` : ""}`;
  board.setAttribute("aria-label", $("board-note").textContent + " " + $("tick-note").textContent);
  const ticks = one.answers.map((_, k) => k + 1), lines = [];
  if (one.certainty) lines.push({ mode: "lines+markers", x: ticks, y: one.certainty, name: "certainty" });
  if (one.target) { const asked = one.problem.map((cell, i) => i).filter(i => one.target[i] != null && !["#", "S", "G"].includes(one.problem[i])); lines.push({ mode: "lines+markers", x: ticks, y: one.answers.map(a => asked.filter(i => a[i] === one.target[i]).length / asked.length), name: "share of cells right" }); }
  Plotly.react($("certainty"), lines, views.layout({ xaxis: { title: { text: "tick" } }, yaxis: { range: [0, 1.04] }, shapes: [{ type: "line", x0: t, x1: t, yref: "paper", y0: 0, y1: 1, line: { color: views.colour("--accent"), width: 2 } }] }), views.config);
}
const move = by => { const tick = $("tick"), to = Number(tick.value) + by; if (to >= 1 && to <= Number(tick.max)) { tick.value = to; drawTick(); return true; } return false; };
$("step").onclick = () => move(1); $("back").onclick = () => move(-1); $("tick").oninput = drawTick; $("overlay").onchange = drawTick; $("problems").onchange = pickProblem; $("grids").onchange = showGrid;
$("play").onclick = () => { if (ticking) { clearInterval(ticking); ticking = 0; $("play").textContent = "Play"; return; } if (Number($("tick").value) === Number($("tick").max)) { $("tick").value = 1; drawTick(); } $("play").textContent = "Pause"; ticking = setInterval(() => { if (!move(1)) $("play").click(); }, 420); };

// Start
await quietly(async () => {
  sides = [new Side(document.querySelector(".side"))];
  await traces();
  wire(sides[0], $("model"), $("effort"));
  for (const [id, names] of [["runs", library.runs], ["grids", library.grids]]) for (const name of names) make("option", "", name, $(id)).value = name;
  if (!library.models.length) $("ask").querySelectorAll("textarea, .dials input, .dials select, #go, #read, #beside").forEach(part => { part.disabled = true; });
  if (!(await recall()) && library.traces.length) await open(sides[0], library.traces[0].key);
  if (!library.models.length && !library.traces.length) room(library.grids.length ? "grid" : "run");
})();
// The text comes first; the figures' library, 5 MB, after it.
document.head.append(Object.assign(document.createElement("script"), { src: "/web/plotly.min.js", onload: () => { redraw(); if (!$("run").hidden) showRun(); if (!$("grid").hidden) showGrid(); } }));
