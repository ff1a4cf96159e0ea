"""The script inside the HTML pages of reports: it draws figures and fills the panel beside them.

It reads what it shows from ``<script type="application/json">`` elements and sets text, never
markup, so that no name can become code.
"""

from __future__ import annotations

#: Draws every figure, again when the reader's preference for light or dark changes.
FIGURES = """
const dark = window.matchMedia("(prefers-color-scheme: dark)");
const narrow = window.matchMedia("(max-width: 640px)");
const rings = new Map();
let selected = null;

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function themed(layout) {
  const ink = colour("--ink"), grid = colour("--grid"), soft = colour("--soft");
  const axis = (old) => Object.assign(
    {gridcolor: grid, zeroline: false, linecolor: grid, automargin: true}, old);
  const out = Object.assign({}, layout, {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: {family: getComputedStyle(document.body).fontFamily, size: 13, color: ink},
    modebar: {bgcolor: "rgba(0,0,0,0)", color: soft, activecolor: ink},
    hoverlabel: {bgcolor: colour("--panel"), bordercolor: soft, font: {color: ink}, align: "left"}
  });
  for (const key of Object.keys(layout)) {
    if (/^[xy]axis/.test(key)) { out[key] = axis(layout[key]); }
  }
  if (layout.scene) {
    out.scene = Object.assign({}, layout.scene);
    for (const key of ["xaxis", "yaxis", "zaxis"]) {
      out.scene[key] = Object.assign(axis(layout.scene[key]), {showbackground: false});
    }
  }
  return narrow.matches ? slender(out) : out;
}

// On a phone: names at the right edge move inside, and a finger scrolls the page.
function slender(layout) {
  const margin = Object.assign({}, layout.margin, {l: Math.min(layout.margin.l, 84), r: 8});
  const annotations = (layout.annotations || []).map((each) => each.xref === "paper" && each.x > 1
    ? Object.assign({}, each, {x: 1, xanchor: "right", bgcolor: colour("--veil")}) : each);
  if (layout.dragmode === "select") { margin.t = 60; }
  return Object.assign(layout, {margin, annotations, dragmode: false,
    font: Object.assign(layout.font, {size: 11})});
}

// On a phone a name turns to the side where it has room.
function turned(trace, layout) {
  const range = (layout[(trace.xaxis || "x").replace("x", "xaxis")] || {}).range;
  if (!narrow.matches || !Array.isArray(trace.textposition) || !range) { return trace; }
  const share = (x) => (x - range[0]) / (range[1] - range[0]);
  const positions = trace.textposition.map((place, at) => {
    const room = 6.5 * trace.text[at].length / (window.innerWidth - 120);
    const fits = {right: share(trace.x[at]) + room < 1, left: share(trace.x[at]) - room > 0};
    const side = place.split(" ")[1], other = side === "right" ? "left" : "right";
    return side in fits && !fits[side] && fits[other] ? place.replace(side, other) : place;
  });
  return Object.assign({}, trace, {textposition: positions});
}

function panelOf(trace) {
  return [trace.scene, trace.xaxis || "x", trace.yaxis || "y"].join(" ");
}

// One empty trace for each panel of a figure, which rings the trial that is shown beside it.
function withRings(figure) {
  const panels = new Map();
  for (const trace of figure.data) {
    if (trace.customdata) { panels.set(panelOf(trace), trace); }
  }
  const added = [...panels.values()].map((trace) => Object.assign(
    {type: trace.type, x: [], y: [], mode: "markers", showlegend: false, hoverinfo: "skip",
     marker: {symbol: "circle-open", size: trace.z ? 14 : 20, color: colour("--ink"),
              line: {width: 2, color: colour("--ink")}}},
    trace.z ? {z: [], scene: trace.scene} : {xaxis: trace.xaxis, yaxis: trace.yaxis}));
  return figure.data.concat(added);
}

function draw() {
  document.querySelectorAll("script[data-for]").forEach((source) => {
    const figure = JSON.parse(source.textContent);
    const div = document.getElementById(source.dataset.for);
    figure.data = figure.data.map((trace) => turned(trace, figure.layout));
    const data = withRings(figure);
    rings.set(div, [...data.keys()].slice(figure.data.length));
    const brushed = figure.layout.dragmode === "select";
    Plotly.react(div, data, themed(figure.layout), {
      displaylogo: false, responsive: true, displayModeBar: brushed || !narrow.matches,
      modeBarButtonsToRemove: brushed ? ["lasso2d"] : ["select2d", "lasso2d"],
      // On by default: a button that uploads the data.
      showSendToCloud: false, plotlyServerURL: ""
    });
    if (!div.dataset.listens) { listen(div, brushed); }
  });
  if (selected !== null) { ring(selected); }
}

function listen(div, brushed) {
  div.dataset.listens = "yes";
  div.on("plotly_click", (event) => {
    const number = event.points[0].customdata;
    if (number !== undefined) { show(number, narrow.matches); }
  });
  if (brushed) {
    div.on("plotly_selected", (event) => brush(div, event));
    div.on("plotly_deselect", () => brush(div, null));
  }
}

// What is selected in one panel stands out in all of them.
function brush(div, event) {
  const chosen = event && event.points.length && new Set(event.points.map((p) => p.customdata));
  const traces = [...div.data.keys()].filter((index) => div.data[index].customdata);
  const points = traces.map((index) => !chosen ? null : div.data[index].customdata.flatMap(
    (number, at) => chosen.has(number) ? [at] : []));
  Plotly.restyle(div, {selectedpoints: points, "unselected.marker.opacity": 0.12}, traces);
}

// Once for each picture that the browser shows: a slider that is dragged asks much more often.
let waiting = null;
function ringSoon(number) {
  if (waiting === null) {
    requestAnimationFrame(() => { const last = waiting; waiting = null; ring(last); });
  }
  waiting = number;
}

function ring(number) {
  for (const [div, indexes] of rings) {
    const at = indexes.map((index) => {
      for (const trace of div.data) {
        const place = trace.customdata && panelOf(trace) === panelOf(div.data[index])
          ? trace.customdata.indexOf(number) : -1;
        if (place >= 0) { return [trace.x[place], trace.y[place], trace.z && trace.z[place]]; }
      }
      return null;
    });
    const coordinate = (axis) => at.map((each) => each ? [each[axis]] : []);
    const update = {x: coordinate(0), y: coordinate(1)};
    if (indexes.length && div.data[indexes[0]].type === "scatter3d") { update.z = coordinate(2); }
    if (indexes.length) { Plotly.restyle(div, update, indexes); }
  }
}
"""

#: Fills the panel: the trial that was clicked or chosen, and the compromise that the weights pick.
PANEL = """
const known = document.getElementById("trials");
const told = known ? JSON.parse(known.textContent) : {trials: [], members: []};
const trials = new Map(told.trials.map((trial) => [trial.n, trial]));

function element(tag, text, kind) {
  const made = document.createElement(tag);
  if (text !== undefined) { made.textContent = text; }
  if (kind) { made.className = kind; }
  return made;
}

function row(cells, tag) {
  const made = element("tr");
  cells.forEach((text) => made.append(element(tag || "td", text)));
  return made;
}

function scores(trial) {
  const table = element("table", undefined, "scores"), head = element("thead");
  const splits = Object.keys(trial.s);
  head.append(row(splits, "th"));
  table.append(head);
  told.objectives.forEach((objective, m) => {
    const body = element("tbody"), title = element("tr"), name = element("th", objective);
    name.colSpan = splits.length;
    title.append(name);
    body.append(title, row(splits.map((split) => trial.s[split][m])));
    table.append(body);
  });
  return table;
}

function coefficients(trial) {
  const table = element("table"), body = element("tbody");
  const largest = Math.max(...trial.c.map((text) => Math.abs(Number(text)))) || 1;
  told.directions.forEach((name, k) => {
    const line = row([name, trial.c[k]]), cell = element("td"), bar = element("span");
    const value = Number(trial.c[k]);
    bar.className = value < 0 ? "bar below" : "bar";
    bar.style.width = 4 * Math.abs(value) / largest + "em";
    cell.append(bar);
    line.append(cell);
    body.append(line);
  });
  table.append(body);
  return table;
}

function command(title, parts, number) {
  const box = element("div", undefined, "told"), code = element("pre", parts.join(number));
  const button = element("button", "copy");
  code.tabIndex = 0;
  button.setAttribute("aria-label", "copy: " + title);
  button.addEventListener("click", () => copy(code, button));
  const head = element("p", title + " ");
  head.append(button);
  box.append(head, code);
  return box;
}

function copy(code, button) {
  const done = () => { button.textContent = "copied"; };
  if (navigator.clipboard) {
    navigator.clipboard.writeText(code.textContent).then(done, () => marked(code, done));
  } else { marked(code, done); }
}

// Pages without TLS have no clipboard of their own.
function marked(code, done) {
  getSelection().selectAllChildren(code);
  if (document.execCommand("copy")) { done(); }
}

function show(number, scroll) {
  const trial = trials.get(number), box = document.getElementById("told");
  if (!box) { return; }
  if (!trial) {
    box.replaceChildren(element("p", "No complete trial has this number."));
    return;
  }
  selected = number;
  const parts = [element("h3", trial.t), scores(trial)];
  if (trial.c) { parts.push(element("h4", "mean coefficients"), coefficients(trial)); }
  parts.push(command("Export it as a model folder:", told.export, number));
  parts.push(command("Print its recipe:", told.recipe, number));
  box.replaceChildren(...parts);
  document.getElementById("number").value = number;
  const pick = document.getElementById("pick");
  pick.value = [...pick.options].some((each) => each.value === String(number)) ? number : "";
  ringSoon(number);
  if (scroll) { document.getElementById("panel").scrollIntoView({block: "start"}); }
}

// The member of the recommended front with the best weighted sum, as `show --prefer` finds it.
function compromise(weights) {
  const sum = weights.reduce((a, b) => a + b, 0);
  let best = null, least = Infinity;
  for (const member of told.members) {
    const scalar = member.l.reduce((total, loss, m) => total + loss * weights[m] / sum, 0);
    if (scalar < least) { best = member.n; least = scalar; }
  }
  return sum > 0 ? best : null;
}

// What the surrogate expects for the weights nearest to the chosen ones; nothing is measured there.
function expect(weights) {
  const box = document.getElementById("between"), between = told.between;
  const sum = weights.reduce((a, b) => a + b, 0);
  if (!between || !sum) { box.replaceChildren(); return; }
  if (between.why) {
    box.replaceChildren(element("p", "Between the trials nothing is expected: " + between.why
      + ".", "note"));
    return;
  }
  const away = (each) => each.w.reduce((total, w, m) => total + (w - weights[m] / sum) ** 2, 0);
  const best = between.expected.reduce((a, b) => away(b) < away(a) ? b : a);
  const shares = best.w.map((w, m) => told.names[m] + " " + Math.round(100 * w) + " %");
  const head = element("summary", "Between the trials "), table = element("table");
  head.append(element("span", "expected, not measured", "chip"));
  best.v.forEach((text, m) => table.append(row([told.objectives[m], text])));
  const parts = [head, element("p", "Around the front, a surrogate of all trials expects the best "
    + "merge for " + shares.join(", ") + " to score on search items:", "note"), table];
  if (best.c.length === told.directions.length) {
    parts.push(element("h4", "mean coefficients"), coefficients(best));
  }
  parts.push(command("Write it down and measure it on test items:", [best.x], ""));
  if (between.bounds) { parts.push(element("p", "Bounds are not looked at.", "note")); }
  const details = box.querySelector("details") || element("details");
  details.replaceChildren(...parts);
  if (!details.isConnected) { box.replaceChildren(details); }
}

function weigh() {
  const sliders = [...document.querySelectorAll("#weights input")];
  const weights = sliders.map((slider) => Number(slider.value));
  const sum = weights.reduce((a, b) => a + b, 0);
  sliders.forEach((slider, m) => {
    slider.nextElementSibling.textContent = sum ? Math.round(100 * weights[m] / sum) + " %" : "–";
  });
  const best = compromise(weights);
  document.getElementById("compromise").textContent = best === null
    ? "Give at least one objective a weight." : "The measured compromise is trial " + best + ".";
  expect(weights);
  return best;
}

function attend() {
  document.getElementById("pick").addEventListener("change", (event) => {
    if (event.target.value !== "") { show(Number(event.target.value)); }
  });
  document.getElementById("number").addEventListener("change", (event) => {
    show(Number(event.target.value));
  });
  document.querySelectorAll("#weights input").forEach((slider) => {
    slider.addEventListener("input", () => {
      const best = weigh();
      if (best !== null) { show(best); }
    });
  });
  if (told.members.length) { weigh(); }
  show(told.leading);
}
"""

SCRIPT = f"""
(function () {{
"use strict";
{FIGURES}{PANEL}
dark.addEventListener("change", draw);
narrow.addEventListener("change", draw);
draw();
if (known) {{ attend(); }}
}})();
"""
