"use strict";
// The page of `rar-jax report`. All text goes through text nodes (`el`), never through innerHTML: it comes from files.

const data = JSON.parse(document.getElementById("data").textContent);
const { runs } = data;
const two = runs.length > 1;

function el(tag, attributes = {}, ...children) {
  const node = tag.startsWith("svg:") ? document.createElementNS("http://www.w3.org/2000/svg", tag.slice(4)) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "style") Object.assign(node.style, value);
    else if (value !== false && value != null) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child != null));
  return node;
}

function number(x) {
  if (Number.isInteger(x) && Math.abs(x) < 1e9) return String(x);
  const size = Math.abs(x);
  return size >= 1e-4 && size < 1e6 ? String(Number(x.toPrecision(6))) : x.toExponential(4);
}

function duration(seconds) {
  const s = Math.round(seconds);
  if (s < 120) return `${s} s`;
  if (s < 7200) return `${Math.round(s / 60)} min`;
  return s < 172800 ? `${(s / 3600).toFixed(1)} h` : `${(s / 86400).toFixed(1)} days`;
}

const colour = (i) => `var(--c${i % 8})`;
const short = (text) => text.replace(/\b([0-9a-f]{12})[0-9a-f]{52}\b/g, "$1…");
const when = (seconds) => new Date(seconds * 1000).toISOString().slice(0, 19).replace("T", " ");
const note = (text) => el("p", { class: "note" }, text);

function table(columns, rows) {
  const cell = (tag, value, i) => el(tag, { class: columns[i].kind }, value instanceof Node ? value : String(value ?? ""));
  return el("div", { class: "scroll" }, el("table", { class: "wide" },
    el("thead", {}, el("tr", {}, ...columns.map((column, i) => cell("th", column.name, i)))),
    el("tbody", {}, ...rows.map((row) => el("tr", { class: row.other ? "other" : false }, ...row.map((value, i) => cell("td", value, i)))))));
}

// A part of the page with a card for each run; where a run has nothing, the sentence that says so. above: what stands over both.
function section(id, title, make, above = []) {
  const cards = runs.map((run) => el("div", { class: "card" },
    two ? el("h3", {}, run.name) : null,
    ...(run.notes[id] ? [note(run.notes[id])] : [make(run)].flat())));
  return el("section", { id }, el("h2", {}, title), ...above, el("div", { class: two ? "runs two" : "runs" }, ...cards));
}

// ---------------------------------------------------------------- overview

function overview(run) {
  const { summary } = run;
  const stages = Object.entries(summary.stages).flatMap(([name, stage]) => {
    const last = Math.max(0, ...run.curves.filter((c) => c.stage === name).map((c) => c.steps.at(-1)));
    const share = stage.steps ? Math.min(1, last / stage.steps) : Number(stage.checkpoints.length > 0);
    const text = stage.steps ? `step ${last} of ${stage.steps}` : "weights were given";
    return [el("span", {}, name), el("div", { class: "bar" }, el("i", { style: { width: `${100 * share}%`, background: colour(0) } })), el("span", { class: "mono" }, text)];
  });
  const parts = Object.entries(summary.seconds).filter(([kind, s]) => kind !== "wall" && s > 0.0005 * summary.seconds.wall).sort((a, b) => b[1] - a[1]);
  const hue = { training: 0, evaluating: 2, tokenizing: 5, starting: 4, saving: 3, ending: 6, lost: 1, stopped: 7 };
  const wall = summary.seconds.wall;
  const time = wall ? [
    note(`${duration(wall)} in all, ${(100 * summary.goodput).toFixed(1)} % of it training, evaluating or tokenizing (goodput)`),
    el("div", { class: "bar" }, ...parts.map(([kind, s]) => el("i", { style: { width: `${100 * s / wall}%`, background: colour(hue[kind]) } }))),
    el("div", { class: "legend" }, ...parts.map(([kind, s]) => el("span", {}, el("i", { style: { background: colour(hue[kind]) } }), `${kind} ${duration(s)} (${(100 * s / wall).toFixed(1)} %)`)))] : [];
  return el("div", { class: "card overview" },
    el("div", { class: "head" }, el("b", {}, run.name), el("span", { class: `badge ${run.state}` }, run.state), el("span", { class: "note" }, `experiment ${summary.experiment}, in ${run.path}`)),
    el("div", { class: "stages" }, ...stages), ...time,
    summary.last_stop && summary.last_stop !== "done" ? el("p", { class: "note problem" }, `last stop: ${summary.last_stop}`) : null,
    ...run.problems.map((text) => el("p", { class: "note problem" }, text)),
    note(`next: ${summary.next}`));
}

// ---------------------------------------------------------------- curves

function nearest(steps, x) {
  let low = 0, high = steps.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (steps[middle] < x) low = middle; else high = middle;
  }
  return Math.abs(steps[low] - x) <= Math.abs(steps[high] - x) ? low : high;
}

// Mean over the last values, as curves.png has it.
function smooth(values, window) {
  let sum = 0;
  return values.map((value, i) => {
    sum += value - (i >= window ? values[i - window] : 0);
    return sum / Math.min(i + 1, window);
  });
}

// Round numbers between two, about `count` of them; on a log scale powers of ten, and 2 and 5 times those.
function ticks(low, high, count, log) {
  if (log) {
    const all = [];
    for (let e = Math.floor(Math.log10(low)); e <= Math.log10(high); e++) for (const m of [1, 2, 5]) all.push(m * 10 ** e);
    let inside = all.filter((x) => x >= low && x <= high);
    if (inside.length > count + 3) inside = inside.filter((x) => Math.abs(Math.log10(x) % 1) < 1e-9);
    const every = Math.ceil(inside.length / (count + 3));
    if (inside.length > 1) return inside.filter((_, i) => i % every === 0);
  }
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find((m) => m * power >= rough) * power;
  const first = Math.ceil(low / step - 1e-9);
  return Array.from({ length: Math.max(1, Math.floor(high / step + 1e-9) - first + 1) }, (_, i) => (first + i) * step);
}

const tickText = (x) => (x !== 0 && (Math.abs(x) < 1e-3 || Math.abs(x) >= 1e5) ? x.toExponential(0).replace("e+", "e") : String(Number(x.toPrecision(3))));
const panels = [];

function panel(stage, name, lines) {
  const values = lines.flatMap((line) => line.values), steps = [...new Set(lines.flatMap((line) => line.steps))].sort((a, b) => a - b);
  const [least, most] = [values.reduce((a, b) => Math.min(a, b)), values.reduce((a, b) => Math.max(a, b))];
  // A log scale where half of the curve would lie on the ground.
  let log = least > 0 && values.toSorted((a, b) => a - b)[values.length >> 1] < most / 10;
  const svg = el("svg:svg", { tabindex: 0, role: "img", "aria-label": `${stage} ${name} by step` });
  const tooltip = el("div", { class: "tooltip", hidden: "" });
  const toggle = el("button", { type: "button", "aria-pressed": log, title: "logarithmic scale", onclick: () => { log = !log; toggle.setAttribute("aria-pressed", log); draw(); } }, "log");
  const left = 52, right = 12, top = 8, bottom = 22;
  let x, y, back, cursor, dots, at = null;

  function draw() {
    const width = svg.clientWidth || 400, height = svg.clientHeight || 210;
    const scale = log ? Math.log10 : (v) => v;
    let [low, high] = [least, most];
    if (log) [low, high] = [low / 1.1, high * 1.1];
    else { const room = (high - low || Math.abs(high) || 1) * 0.06; [low, high] = [low - room, high + room]; }
    const [first, last] = [steps[0], steps.at(-1) > steps[0] ? steps.at(-1) : steps[0] + 1];
    x = (step) => left + (width - left - right) * (step - first) / (last - first);
    y = (value) => height - bottom - (height - top - bottom) * (scale(value) - scale(low)) / (scale(high) - scale(low));
    back = (px) => first + (px - left) * (last - first) / (width - left - right);
    svg.replaceChildren();
    for (const tick of ticks(low, high, 4, log)) svg.append(
      el("svg:line", { class: "gridline", x1: left, x2: width - right, y1: y(tick), y2: y(tick) }),
      el("svg:text", { x: left - 7, y: y(tick) + 4, "text-anchor": "end" }, tickText(tick)));
    for (const tick of ticks(first, last, Math.max(3, width / 80), false)) svg.append(
      el("svg:text", { x: Math.min(x(tick), width - right - 8), y: height - 5, "text-anchor": "middle" }, tickText(tick)));
    for (const line of lines) {
      const path = (ys, kind) => el("svg:path", { class: kind, d: line.steps.map((step, i) => `${i ? "L" : "M"}${x(step).toFixed(1)} ${y(ys[i]).toFixed(1)}`).join(""), stroke: line.colour, "stroke-dasharray": line.dash });
      const noisy = line.values.length > 100 && !line.name.startsWith("validation/");
      if (noisy) svg.append(path(line.values, "raw"));
      svg.append(path(noisy ? smooth(line.values, Math.ceil(line.values.length / 40)) : line.values, "line"));
      if (line.values.length < 30) svg.append(...line.steps.map((step, i) => el("svg:circle", { cx: x(step), cy: y(line.values[i]), r: 2.6, fill: line.colour })));
    }
    cursor = el("svg:line", { class: "cursor", y1: top, y2: height - bottom, visibility: "hidden" });
    dots = lines.map((line) => el("svg:circle", { r: 4, fill: line.colour, stroke: "var(--card)", "stroke-width": 1.5, visibility: "hidden" }));
    svg.append(cursor, ...dots);
  }

  // The cursor stands at the same step in all panels of the stage; the one under the mouse also says the values.
  function point(step, speaking) {
    const seen = step === null ? [] : lines.map((line) => nearest(line.steps, step));
    for (const node of [cursor, ...dots]) node.setAttribute("visibility", step === null ? "hidden" : "visible");
    tooltip.hidden = step === null || !speaking;
    if (step === null) return;
    cursor.setAttribute("x1", x(step)); cursor.setAttribute("x2", x(step));
    lines.forEach((line, i) => { dots[i].setAttribute("cx", x(line.steps[seen[i]])); dots[i].setAttribute("cy", y(line.values[seen[i]])); });
    if (!speaking) return;
    tooltip.replaceChildren(el("b", {}, `step ${step}`), el("table", {}, ...lines.map((line, i) => {
      const own = line.steps[seen[i]];
      return el("tr", { "data-name": line.name, "data-run": line.run, "data-step": own },
        el("td", { class: "name" }, el("i", { style: { background: line.colour } }), line.label), el("td", { class: "number value" }, number(line.values[seen[i]])),
        el("td", { class: "note" }, own === step ? "" : `at ${own}`));
    })));
    const place = x(step) + svg.offsetLeft, room = svg.parentNode.clientWidth;
    const beside = place + 14 + tooltip.offsetWidth > room - 6 ? place - 14 - tooltip.offsetWidth : place + 14;
    tooltip.style.left = `${Math.max(4, beside)}px`;
    tooltip.style.top = `${svg.offsetTop + 10}px`;
  }
  const all = (step) => { at = step; panels.filter((p) => p.stage === stage).forEach((p) => p.point(step, p.svg === svg)); };
  svg.addEventListener("pointermove", (event) => all(steps[nearest(steps, back(event.clientX - svg.getBoundingClientRect().left))]));
  svg.addEventListener("pointerleave", () => all(null));
  svg.addEventListener("blur", () => all(null));
  svg.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!move) return;
    event.preventDefault();
    all(steps[at === null ? (move > 0 ? 0 : steps.length - 1) : Math.max(0, Math.min(steps.length - 1, nearest(steps, at) + move))]);
  });
  panels.push({ stage, svg, draw, point });
  const legend = lines.length > 1 || lines[0].name !== name
    ? el("div", { class: "legend" }, ...lines.map((line) => el("span", {}, el("i", { style: { background: line.dash ? `repeating-linear-gradient(90deg, ${line.colour} 0 4px, transparent 4px 7px)` : line.colour } }), line.label))) : null;
  const cut = lines.filter((line) => line.of > line.steps.length);
  return el("div", { class: "card panel", "data-panel": `${stage} ${name}` },
    el("header", {}, el("b", {}, name), least > 0 ? toggle : null), svg, tooltip, legend,
    cut.length ? note(`${cut[0].steps.length} of ${cut[0].of} points: the peaks of each span`) : null);
}

function allCurves() {
  const groups = new Map();
  const heldout = new Set(runs.flatMap((run) => run.curves.filter((c) => c.name.startsWith("validation/")).map((c) => `${c.stage} ${c.panel}`)));
  runs.forEach((run, r) => run.curves.forEach((curve) => {
    const stage = groups.get(curve.stage) ?? groups.set(curve.stage, new Map()).get(curve.stage);
    const lines = stage.get(curve.panel) ?? stage.set(curve.panel, []).get(curve.panel);
    const twin = lines.find((line) => line.name === curve.name);
    const hue = twin ? twin.hue : new Set(lines.map((line) => line.name)).size;
    const plain = curve.name.startsWith("validation/") ? `held-out ${curve.name.slice(11)}` : curve.name === curve.panel && heldout.has(`${curve.stage} ${curve.panel}`) ? "training" : curve.name;
    const label = two ? `${plain}, ${run.name}` : plain;
    lines.push({ ...curve, run: r, hue, colour: colour(hue), label, dash: r ? "5 3" : null });
  }));
  const order = ["generator", "tokenizer", "classifier"].filter((stage) => groups.has(stage));
  for (const stage of groups.keys()) if (!order.includes(stage)) order.push(stage);
  return el("section", { id: "curves" }, el("h2", {}, "Curves"),
    ...runs.filter((run) => run.notes.curves).map((run) => note(two ? `${run.name}: ${run.notes.curves}` : run.notes.curves)),
    ...order.flatMap((stage) => [el("h3", { class: "stage" }, stage), el("div", { class: "panels" }, ...[...groups.get(stage)].map(([name, lines]) => panel(stage, name, lines)))]));
}

// ---------------------------------------------------------------- grids

function gridViewer(grid) {
  const samples = grid.stage !== "tokenizer", [height, width] = grid.cell;
  const names = samples ? grid.rows : grid.columns;
  const chosen = new Set(), scale = Math.max(1, Math.round(52 / Math.min(width, height)));
  const step = el("output", { class: "mono" }), cells = el("div", { class: "cells" });
  const slider = el("input", { type: "range", min: 0, max: grid.steps.length - 1, value: grid.steps.length - 1, "aria-label": "step", oninput: show });
  const play = el("button", { type: "button", onclick: start, disabled: grid.steps.length < 2 }, "play");
  const chips = [...new Set(names)].map((name) => el("button", { type: "button", "aria-pressed": false, title: name, onclick: (event) => {
    chosen.has(name) ? chosen.delete(name) : chosen.add(name);
    event.currentTarget.setAttribute("aria-pressed", chosen.has(name));
    show();
  } }, name));
  const every = el("button", { type: "button", onclick: () => { chosen.clear(); chips.forEach((chip) => chip.setAttribute("aria-pressed", false)); show(); } }, "all classes");
  let timer = null, wanted = 0;

  async function show() {
    const told = grid.steps[slider.value], mine = ++wanted, image = new Image();
    step.value = `step ${told.step}`;
    image.src = told.image;
    await image.decode();
    if (mine !== wanted) return; // the slider has moved on
    const keep = (name) => chosen.size === 0 || chosen.has(name);
    const rows = grid.rows.map((name, r) => [name, r]).filter(([name]) => !samples || keep(name));
    const columns = grid.columns.map((name, c) => [name, c]).filter(([name]) => samples || keep(name));
    cells.style.gridTemplateColumns = `max-content repeat(${columns.length}, max-content)`;
    const top = samples ? [] : [el("span"), ...columns.map(([name]) => el("span", { class: "top", title: name, style: { maxWidth: `${width * scale}px` } }, name))];
    const body = rows.flatMap(([name, r]) => [el("span", { title: name }, name), ...columns.map(([column, c]) => {
      const canvas = el("canvas", { width, height, class: scale > 1 ? "small" : false, "data-row": name, "data-column": c, style: { width: `${width * scale}px`, height: `${height * scale}px` } });
      canvas.getContext("2d").drawImage(image, c * width, r * height, width, height, 0, 0, width, height);
      return canvas;
    })]);
    cells.replaceChildren(...top, ...body);
    cells.dataset.step = told.step;
  }
  function start() {
    if (timer) { clearInterval(timer); timer = null; play.textContent = "play"; return; }
    if (Number(slider.value) === grid.steps.length - 1) { slider.value = 0; show(); }
    play.textContent = "stop";
    timer = setInterval(() => {
      slider.value = Number(slider.value) + 1;
      show();
      if (Number(slider.value) === grid.steps.length - 1) start();
    }, 500);
  }
  show();
  return el("div", { class: "grid", "data-stage": grid.stage },
    el("h3", {}, samples ? `${grid.stage}: samples of the same labels and noise` : `${grid.stage}: held-out images and their reconstructions`),
    el("div", { class: "controls" }, play, slider, step), el("div", { class: "chips" }, every, ...chips), cells);
}

// ---------------------------------------------------------------- tables

const keyValue = [{ name: "", kind: "short" }, { name: "", kind: "mono" }];

function scoreTable(run) {
  return run.scores.map((score) => el("div", { class: "score", "data-file": score.file }, el("h3", {}, score.file),
    el("div", { class: "pair" },
      table([{ name: "metric", kind: "" }, { name: "value", kind: "number" }, { name: "n", kind: "number" }], score.numbers.map(([name, value, n]) => [name, number(value), n ?? ""])),
      table([{ name: "depends on", kind: "short" }, { name: "", kind: "mono" }], Object.entries(score.conditions).map(([name, text]) => [name, el("span", { title: text }, short(text))]))),
    ...score.said.map(note),
    el("details", {}, el("summary", {}, "all that it was made from, and on"), table(keyValue, [...score.made_from, ...score.made_on]))));
}

// Both runs in a row; marked are the conditions and the numbers of images that differ, without which being equal the numbers do not compare.
function comparedTable(score) {
  const value = (x) => (x === null ? "" : number(x)), names = runs.map((run) => run.name);
  const conditions = score.conditions.map(([name, one, other]) => {
    const row = [name, ...[one, other].map((text) => el("span", { title: text }, short(text)))];
    row.other = one !== other;
    return row;
  });
  const numbers = score.numbers.map(([name, one, other, ...n]) => {
    const row = [name, value(one), value(other), [...new Set(n.filter((x) => x !== null))].join(" | ")];
    row.other = n.every((x) => x !== null) && n[0] !== n[1];
    return row;
  });
  return el("div", { class: "card compared", "data-file": score.file }, el("h3", {}, `${score.file}, both`), el("div", { class: "pair" },
    table([{ name: "metric", kind: "" }, ...names.map((name) => ({ name, kind: "number" })), { name: "n", kind: "number" }], numbers),
    table([{ name: "depends on", kind: "short" }, ...names.map((name) => ({ name, kind: "mono" }))], conditions)));
}

function configTables() {
  const values = runs.map((run) => new Map(run.config)), keys = [...new Set(runs.flatMap((run) => run.config.map(([key]) => key)))];
  const body = el("div", {}), only = el("input", { type: "checkbox", checked: two, onchange: fill });
  const search = el("input", { type: "search", placeholder: "filter, such as train.steps", "aria-label": "filter the config", oninput: fill });
  function fill() {
    const rows = keys.map((key) => { const row = [key, ...values.map((map) => map.get(key) ?? "")]; row.other = two && row[1] !== row[2]; return row; })
      .filter((row) => row.join(" ").toLowerCase().includes(search.value.toLowerCase()) && (!only.checked || row.other));
    body.replaceChildren(rows.length ? table([{ name: "key", kind: "short" }, ...runs.map((run) => ({ name: two ? run.name : "value", kind: "mono" }))], rows) : note(only.checked && !search.value ? "nothing differs" : "nothing matches"));
  }
  fill();
  return el("section", { id: "config" }, el("h2", {}, "Config, resolved"), el("div", { class: "card" }, el("div", { class: "controls" }, search, two ? el("label", {}, only, " only what differs") : null), body));
}

function environment(run) {
  return run.environment.map((start) => table(keyValue, [
    ["device", `${start.devices} x ${start.device}`], ["processes", start.processes], ["host", start.host], ...Object.entries(start.versions)]));
}

function ledgerTable(run) {
  const known = ["time", "run", "event", "seconds", "versions"];
  const text = (name, value) => (name === "last_sign" ? when(value) : typeof value === "object" ? JSON.stringify(value) : String(value));
  const told = ([name, value]) => !known.includes(name) && value !== null && !(name === "last_sign" && value === 0);  // 0: the first start
  const rows = run.ledger.rows.map((row) => [when(row.time), row.run, row.event,
    Object.entries(row).filter(told).map(([name, value]) => `${name} ${text(name, value)}`).join(", "),
    Object.entries(row.seconds ?? {}).map(([kind, s]) => `${kind} ${number(s)} s`).join(", ")]);
  const less = run.ledger.of > rows.length ? [note(`the last ${rows.length} of ${run.ledger.of} rows`)] : [];
  return [...less, table([{ name: "time (UTC)", kind: "short" }, { name: "run", kind: "short" }, { name: "event", kind: "short" }, { name: "", kind: "" }, { name: "time since the row before", kind: "" }], rows)];
}

// ---------------------------------------------------------------- the page

const links = [["curves", "Curves"], ["grids", "Samples"], ["pictures", "Final pictures"], ["scores", "Scores"], ["config", "Config"], ["environment", "Environment"], ["ledger", "Ledger"]];
const dark = () => document.documentElement.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
const theme = el("button", { type: "button", onclick: () => { document.documentElement.dataset.theme = dark() === "dark" ? "light" : "dark"; } }, "light / dark");
document.body.append(
  el("nav", {}, el("div", {}, el("strong", {}, runs.map((run) => run.name).join(" | ")), ...links.map(([id, name]) => el("a", { href: `#${id}` }, name)), el("span", { class: "space" }), theme)),
  el("main", {},
    el("h2", {}, "Overview"), el("div", { class: two ? "runs two" : "runs" }, ...runs.map(overview)),
    allCurves(),
    section("grids", "Samples and reconstructions over time", (run) => el("div", { class: "beside" }, ...run.grids.map(gridViewer).reverse())),
    section("pictures", "Final pictures", (run) => el("div", { class: "beside" }, ...run.pictures.map((picture) => el("div", {}, el("h3", {}, picture.name), el("img", { class: "picture", src: picture.image, alt: picture.name }))))),
    section("scores", "Scores, and what they depend on", scoreTable, data.compared.map(comparedTable)),
    configTables(),
    section("environment", "Environment", environment),
    section("ledger", "Ledger of the runs", ledgerTable),
    note(`made ${data.made} by rar_jax ${data.version}`)));
panels.forEach((p) => p.draw());
addEventListener("resize", () => panels.forEach((p) => p.draw()));
