// The linked views of one trace. Each draws with Plotly into `plot` and returns its caption; `now` is what all share:
// { loops, selected, at } - the loops shown (recorded or replayed), the chosen token, the threshold's step (0..200) or null.

export const COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#785ef0", "#8c8c8c"]; // Okabe and Ito's, safe for the colour-blind
const WINDOW = 36; // tokens of the lens grid: as many as words can be read in
const ink = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
let canvas;
export function colour(name) { // a CSS variable as a colour that Plotly reads; light-dark() is resolved by the browser
  canvas ??= document.body.appendChild(Object.assign(document.createElement("i"), { hidden: true }));
  canvas.style.color = ink(name);
  return getComputedStyle(canvas).color;
}
export function layout(more) {
  const axis = { gridcolor: colour("--line"), zerolinecolor: colour("--line"), linecolor: colour("--line"), automargin: true };
  const base = { paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", margin: { l: 58, r: 18, t: 18, b: 48 },
    font: { family: "system-ui, sans-serif", size: 12.5, color: colour("--ink") }, colorway: COLOURS, hovermode: "closest",
    legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 }, ...more };
  for (const name of Object.keys(base)) if (/^[xy]axis/.test(name)) base[name] = { ...axis, ...base[name] };
  return base;
}
export const config = { displaylogo: false, responsive: true, modeBarButtonsToRemove: ["lasso2d", "select2d", "toImage"] };
const range = (from, to) => Array.from({ length: to - from }, (_, i) => from + i);
const short = text => text.length > 9 ? text.slice(0, 8) + "…" : text;
const plural = n => n === 1 ? "1 loop" : n + " loops";
const sideways = rows => rows[0].map((_, r) => rows.map(row => row[r]));

const MODES = {
  probability: { title: "probability of the token that followed", scale: "Viridis", of: t => t.losses && t.losses.map(row => row.map(v => v == null ? null : Math.exp(-v))), top: 1 },
  entropy: { title: "entropy of the prediction, nats", scale: "Cividis", of: t => t.entropy },
  kl: { title: "distance from the last loop's prediction, KL in nats", scale: "Cividis", of: t => t.kl },
};
export const modes = trace => Object.keys(MODES).filter(name => MODES[name].of(trace)).map(name => [name, { kl: "KL to final" }[name] || name]);

export function lens(plot, trace, now, { mode }) {
  const kind = MODES[mode], R = trace.max, T = trace.labels.length;
  const from = Math.max(0, Math.min((now.selected < 0 ? 0 : now.selected) - WINDOW / 2 | 0, T - WINDOW)), to = Math.min(T, from + WINDOW);
  const shown = range(from, to), loops = range(1, R + 1);
  const values = sideways(kind.of(trace).slice(from, to)), words = trace.top
    ? sideways(trace.top.slice(from, to).map(row => loops.map((_, r) => row[r] && row[r].length ? short(trace.words[row[r][0]]) : ""))) : values.map(row => row.map(() => ""));
  const hidden = loops.map(n => shown.map(i => now.loops[i] && n > now.loops[i] ? 1 : null));
  const lineX = [], lineY = [];
  for (const i of shown) { const n = now.loops[i] || null; lineX.push(i - .5, i + .5); lineY.push(n && n + .5, n && n + .5); }
  const ticks = shown.map(i => short(trace.labels[i]));
  const data = [
    { type: "heatmap", x: shown, y: loops, z: values, text: words, texttemplate: R <= 16 ? "%{text}" : "", textfont: { size: 10.5 }, colorscale: kind.scale, zmin: 0,
      ...(kind.top ? { zmax: kind.top } : {}), xgap: 1, ygap: 1, colorbar: { thickness: 10, title: { text: kind.title, side: "right", font: { size: 11.5 } } },
      customdata: values.map((row, r) => shown.map(i => trace.labels[i])), hovertemplate: "after loop %{y}, for %{customdata}<br>says %{text}<br>%{z:.3f}<extra></extra>" },
    { type: "heatmap", x: shown, y: loops, z: hidden, colorscale: [[0, colour("--card")], [1, colour("--card")]], opacity: .62, showscale: false, hoverinfo: "skip", xgap: 1, ygap: 1 },
    { type: "scatter", mode: "lines", x: lineX, y: lineY, line: { color: colour("--accent"), width: 2.5, shape: "linear" }, connectgaps: false, hoverinfo: "skip", name: "left here" },
  ];
  const shapes = now.selected >= 0 ? [{ type: "rect", x0: now.selected - .5, x1: now.selected + .5, y0: .5, y1: R + .5, line: { color: colour("--accent"), width: 1.5 } }] : [];
  Plotly.react(plot, data, layout({ showlegend: false, shapes, margin: { l: 52, r: 10, t: 12, b: 76 },
    xaxis: { tickvals: shown, ticktext: ticks, tickangle: -55, range: [from - .5, to - .5], title: { text: "the token that followed" } },
    yaxis: { title: { text: "loop" }, range: [.5, R + .5], dtick: Math.ceil(R / 12) } }), config);
  return `${trace.lens === "coda lens" ? "Coda lens: each loop's state read through coda, norm and head, as the model reads its last." : "Logit lens: each loop's state read by the final norm and the head."} `
    + `Each cell is the likeliest token after that loop. Orange: where the token left; pale cells beyond it are counterfactual, recorded by running every loop.`
    + (T > WINDOW ? ` Tokens ${from} to ${to - 1} of ${T}; choose a token to move.` : "");
}

export function path(plot, trace, now, { flat }) {
  const { xyz, explained, steps, angles } = trace.paths, chosen = now.selected < 0 ? trace.loops.findIndex(n => n) : now.selected;
  const some = xyz.map((row, i) => [row, i]).filter(([row, i]) => row[0][0] != null && i !== chosen);
  const thin = some.filter((_, k) => k % Math.ceil(some.length / 60) === 0), deep = flat !== "2-D";
  const share = i => (100 * explained[i]).toFixed(0) + "%", scene = deep ? {} : { xaxis: "x", yaxis: "y" };
  const line = (points, more) => ({ type: deep ? "scatter3d" : "scatter", x: points.map(p => p[0]), y: points.map(p => p[1]), ...(deep ? { z: points.map(p => p[2]) } : scene), ...more });
  const others = { x: [], y: [], z: [] };
  for (const [row] of thin) { for (const p of row) { others.x.push(p[0]); others.y.push(p[1]); others.z.push(p[2]); } others.x.push(null); others.y.push(null); others.z.push(null); }
  const data = [{ type: deep ? "scatter3d" : "scatter", mode: "lines", ...others, ...(deep ? {} : { z: undefined, ...scene }), line: { color: colour("--muted"), width: 1 }, opacity: .35, hoverinfo: "skip", name: "other tokens" }];
  if (chosen >= 0 && xyz[chosen][0][0] != null) data.push(line(xyz[chosen], { mode: "lines+markers+text", text: xyz[chosen].map((_, r) => String(r + 1)), textposition: "top center",
    line: { color: COLOURS[1], width: deep ? 5 : 2.5 }, marker: { size: deep ? 4 : 8, color: xyz[chosen].map((_, r) => r + 1), colorscale: "Viridis" }, name: trace.labels[chosen] }));
  const middle = (rows, r) => { const all = rows.map(row => row[r]).filter(v => v != null).sort((a, b) => a - b); return all.length ? all[all.length >> 1] : null; };
  const loops = range(1, trace.max + 1);
  for (const [rows, y, word] of [[steps, "y2", "step"], [angles, "y3", "angle"]]) {
    data.push({ type: "scatter", mode: "lines", x: loops, y: loops.map((_, r) => middle(rows, r)), xaxis: y === "y2" ? "x2" : "x3", yaxis: y, line: { color: colour("--muted"), dash: "dot" }, showlegend: false, name: "median " + word });
    if (chosen >= 0) data.push({ type: "scatter", mode: "lines+markers", x: loops, y: rows[chosen], xaxis: y === "y2" ? "x2" : "x3", yaxis: y, line: { color: COLOURS[1] }, showlegend: false, name: word + " of " + trace.labels[chosen] });
  }
  const axis3 = i => ({ title: { text: `component ${i + 1} (${share(i)})` }, gridcolor: colour("--line"), zerolinecolor: colour("--line"), color: colour("--muted") });
  Plotly.react(plot, data, layout({
    ...(deep ? { scene: { domain: { x: [0, .6] }, xaxis: axis3(0), yaxis: axis3(1), zaxis: axis3(2) } }
      : { xaxis: { domain: [0, .58], title: { text: `component 1 (${share(0)})` } }, yaxis: { title: { text: `component 2 (${share(1)})` } } }),
    xaxis2: { domain: [.69, 1], anchor: "y2" }, yaxis2: { domain: [.57, 1], anchor: "x2", rangemode: "tozero", title: { text: "step / state" } },
    xaxis3: { domain: [.69, 1], anchor: "y3", title: { text: "loop" } }, yaxis3: { domain: [0, .43], anchor: "x3", range: [0, 180], dtick: 60, title: { text: "angle, degrees" } } }), config);
  return `Left: principal components of all states of this text (they explain ${share(0)}, ${share(1)}, ${share(2)}); a projection can invent spirals. Right, unprojected: `
    + "the length of each update relative to the state, and the angle to the update before it (dotted: median over tokens).";
}

export function exits(plot, trace, now) {
  if (!trace.cdf) return null;
  const loops = range(1, trace.max + 1), counted = trace.cdf.filter(row => row.length === trace.max);
  const mean = loops.map((_, r) => counted.reduce((sum, row) => sum + row[r], 0) / counted.length / 1e4);
  const q = now.at == null ? trace.recorded ?? 1 : now.at / 200, shown = now.selected >= 0 && trace.cdf[now.selected].length ? now.selected : -1;
  const faint = { x: [], y: [] };
  for (const row of counted.filter((_, k) => k % Math.ceil(counted.length / 80) === 0)) { faint.x.push(...loops, null); faint.y.push(...row.map(v => v / 1e4), null); }
  const data = [
    { mode: "lines", ...faint, line: { color: colour("--muted"), width: .8 }, opacity: .35, hoverinfo: "skip", name: "tokens" },
    { mode: "lines+markers", x: loops, y: mean, line: { color: COLOURS[0], width: 2.5 }, name: "mean over tokens" },
  ];
  if (shown >= 0) data.push({ mode: "lines+markers", x: loops.slice(0, trace.cdf[shown].length), y: trace.cdf[shown].map(v => v / 1e4), line: { color: COLOURS[1], width: 2.5 }, name: trace.labels[shown] });
  if (trace.curve) data.push({ mode: "lines", x: trace.curve.loops, y: trace.curve.loops.map((_, i) => i / 200), line: { color: COLOURS[2], dash: "dash" }, name: "threshold → mean loops", hovertemplate: "threshold %{y:.3f}: %{x:.2f} loops<extra></extra>" });
  Plotly.react(plot, data, layout({ xaxis: { title: { text: "loop" }, dtick: Math.ceil(trace.max / 12), range: [.8, trace.max + .2] }, yaxis: { title: { text: "chance of having left by this loop" }, range: [0, 1.03] },
    shapes: [{ type: "line", xref: "paper", x0: 0, x1: 1, y0: q, y1: q, line: { color: colour("--accent"), width: 3 }, name: "threshold" }] }),
    { ...config, edits: { shapePosition: true } });
  return "Drag the orange line: a token leaves at the first loop whose curve reaches it, and the text is tinted anew. This is a replay of recorded hazards; a real early exit changes what later tokens read.";
}

const UNITS = { loops: ["mean loops", 1], flops: ["operations per token, 10⁶ (estimated)", 1e-6], seconds: ["milliseconds per token (measured, this text read in one pass)", 1e3], kv_bytes: ["bytes of keys and values per token, 10³", 1e-3] };
export const units = trace => Object.keys(UNITS).filter(name => name === "loops" || trace.costs).map(name => [name, { kv_bytes: "KV bytes", flops: "FLOPs", seconds: "measured time" }[name] || name]);

export function quality(plot, trace, now, { unit }) {
  if (!trace.depths) return null;
  const [title, scale] = UNITS[unit], costs = unit === "loops" ? range(1, trace.max + 1) : trace.costs[unit];
  const at = mean => { const low = Math.min(Math.floor(mean), costs.length) - 1, high = Math.min(low + 1, costs.length - 1); return scale * (costs[low] + (mean - 1 - low) * (costs[high] - costs[low])); };
  const data = [{ mode: "lines+markers+text", x: costs.map(v => v * scale), y: trace.depths, text: costs.map((_, r) => plural(r + 1)), textposition: "top right", name: "every token at one depth",
    line: { color: colour("--muted"), dash: "dot" }, marker: { size: 9, color: COLOURS[0] }, hovertemplate: "%{text}: %{y:.4f} nats<extra></extra>" }];
  const curve = trace.curve;
  if (curve && curve.loss) {
    data.push({ mode: "lines", x: curve.loops.map(at), y: curve.loss, line: { color: COLOURS[1], width: 2 }, name: "leaving by threshold (replay)", text: curve.loops.map((n, i) => `threshold ${(i / 200).toFixed(3)}, ${n.toFixed(2)} loops`), hovertemplate: "%{text}<br>%{y:.4f} nats<extra></extra>" });
    if (now.at != null) data.push({ mode: "markers", x: [at(curve.loops[now.at])], y: [curve.loss[now.at]], marker: { size: 13, color: colour("--accent"), line: { width: 2, color: colour("--card") } }, name: "this threshold" });
  }
  Plotly.react(plot, data, layout({ xaxis: { title: { text: title } }, yaxis: { title: { text: "loss on this text, nats per token (lower is better)" } } }), config);
  return "Dotted: mixing tokens of neighbouring depths at random. A threshold whose line runs below it picks its exits well. On one short text differences are noisy."
    + (unit === "loops" ? "" : unit === "seconds" ? " Fixed depths are measured; between them time is interpolated, not measured." : " Between whole depths costs are interpolated.");
}
