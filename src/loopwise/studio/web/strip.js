// The text as a strip of tokens, each tinted by the loops it took. One file for the studio and for notebooks: it keeps
// the contract of anywidget, render({ model, el }) with model.get, model.set, model.on and model.save_changes.
//
//   "texts"     [text]     what to show, safe to show
//   "loops"     [n]        loops of each token; 0 for one that was given
//   "max"       R          loops a token could have run
//   "faint"     [index]    provisional tokens, which another may still replace
//   "labels"    [text]     one-line names for screen readers (default: the texts)
//   "selected"  index      written when a token is chosen; -1 for none
//   "hovered"   index      written when the pointer or the focus is on a token; -1 for none

const plural = n => n === 1 ? "1 loop" : n + " loops";

function render({ model, el }) {
  const box = document.createElement("div");
  box.className = "lw-strip";
  box.setAttribute("role", "listbox");
  box.setAttribute("aria-label", "The text, one option per token; arrow keys move");
  el.append(box);
  const drawn = []; // per token: what stands in the page, so that a change touches only what differs
  let selected = -1;

  function draw() {
    const texts = model.get("texts") || [], loops = model.get("loops") || [], most = model.get("max") || 1;
    const faint = new Set(model.get("faint") || []), labels = model.get("labels") || texts;
    while (drawn.length > texts.length) drawn.pop().node.remove();
    for (let i = 0; i < texts.length; i++) {
      if (i === drawn.length) {
        const node = document.createElement("span");
        node.className = "lw-t";
        node.setAttribute("role", "option");
        node.setAttribute("aria-selected", "false");
        node.tabIndex = i ? -1 : 0;
        node.dataset.index = i;
        box.append(node);
        drawn.push({ node, text: null, loops: null, faint: null, most: null });
      }
      const now = drawn[i], n = loops[i] || 0, pale = faint.has(i);
      if (now.text !== texts[i]) write(now.node, texts[i]);
      if (now.loops !== n || now.most !== most || now.text !== texts[i] || now.faint !== pale) {
        now.node.style.setProperty("--n", n && most > 1 ? (n - 1) / (most - 1) : 0);
        now.node.classList.toggle("given", !n);
        now.node.classList.toggle("faint", pale);
        now.node.dataset.n = n || "";
        now.node.setAttribute("aria-label", labels[i] + (pale ? ", provisional" : n ? `, ${n} of ${plural(most)}` : ", given"));
      }
      Object.assign(now, { text: texts[i], loops: n, faint: pale, most });
    }
    if (selected >= texts.length) choose(-1);
  }

  function write(node, text) {
    node.replaceChildren();
    for (const part of (text || "∅").split(/(\n|\t)/)) {
      if (part === "\n" || part === "\t") {
        const sign = document.createElement("i");
        sign.className = part === "\n" ? "lw-nl" : "lw-tab";
        node.append(sign);
      }
      if (part) node.append(part);
    }
  }

  function choose(index, focus) {
    for (const [i, yes] of [[selected, "false"], [index, "true"]]) if (drawn[i]) {
      drawn[i].node.setAttribute("aria-selected", yes);
      drawn[i].node.tabIndex = yes === "true" ? 0 : -1;
    }
    selected = index;
    if (focus && drawn[index]) drawn[index].node.focus();
  }
  function tell(index) { model.set("selected", index); model.save_changes(); }

  const at = event => { const node = event.target.closest(".lw-t"); return node ? Number(node.dataset.index) : -1; };
  box.addEventListener("mouseover", event => { model.set("hovered", at(event)); model.save_changes(); });
  box.addEventListener("mouseleave", () => { model.set("hovered", -1); model.save_changes(); });
  box.addEventListener("click", event => { const i = at(event); if (i >= 0) tell(i === selected ? -1 : i); });
  box.addEventListener("keydown", event => {
    const last = drawn.length - 1, here = selected < 0 ? at(event) : selected;
    const to = { ArrowRight: Math.min(here + 1, last), ArrowDown: Math.min(here + 1, last), ArrowLeft: Math.max(here - 1, 0),
      ArrowUp: Math.max(here - 1, 0), Home: 0, End: last, Escape: -1, Enter: here, " ": here }[event.key];
    if (to == null) return;
    event.preventDefault();
    tell(to);
    if (to >= 0) choose(to, true);
  });

  const changes = ["texts", "loops", "max", "faint", "labels"];
  const follow = () => choose(model.get("selected") ?? -1);
  for (const name of changes) model.on("change:" + name, draw);
  model.on("change:selected", follow);
  draw(); follow();
  return () => {
    for (const name of changes) model.off?.("change:" + name, draw);
    model.off?.("change:selected", follow);
    box.remove();
  };
}

export default { render };
