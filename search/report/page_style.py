"""The script and the style sheet inside the HTML page of a report."""

from __future__ import annotations

#: Draws every figure, again when the reader's preference for light or dark changes.
DRAW = """
(function () {
  var dark = window.matchMedia("(prefers-color-scheme: dark)");
  function colour(name) {
    return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  }
  function themed(layout) {
    var ink = colour("--ink"), grid = colour("--grid"), soft = colour("--soft");
    var axis = function (old) {
      return Object.assign({gridcolor: grid, zeroline: false, linecolor: grid,
                            automargin: true}, old);
    };
    var out = Object.assign({}, layout, {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: {family: getComputedStyle(document.body).fontFamily, size: 13, color: ink},
      modebar: {bgcolor: "rgba(0,0,0,0)", color: grid, activecolor: soft},
      hoverlabel: {bgcolor: colour("--panel"), bordercolor: soft, font: {color: ink}, align: "left"}
    });
    Object.keys(layout).forEach(function (key) {
      if (/^[xy]axis/.test(key)) { out[key] = axis(layout[key]); }
    });
    if (layout.scene) {
      out.scene = Object.assign({}, layout.scene);
      ["xaxis", "yaxis", "zaxis"].forEach(function (key) {
        out.scene[key] = Object.assign(axis(layout.scene[key]), {showbackground: false});
      });
    }
    return out;
  }
  function draw() {
    document.querySelectorAll("script[data-for]").forEach(function (source) {
      var figure = JSON.parse(source.textContent);
      Plotly.react(source.dataset.for, figure.data, themed(figure.layout), {
        displaylogo: false, responsive: true, modeBarButtonsToRemove: ["select2d", "lasso2d"],
        // On by default: a button that uploads the data.
        showSendToCloud: false, plotlyServerURL: ""
      });
    });
  }
  dark.addEventListener("change", draw);
  draw();
})();
"""

STYLE = """
:root { color-scheme: light dark; --ink: #202124; --soft: #5f6368; --grid: #e3e5e8; --page: #ffffff;
  --panel: #f6f7f9; --blue: #0072b2; --star: #b84a00; --mark: #fdf1e7; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8eaed; --soft: #a2a8b0; --grid: #3a3f45; --page: #17191c;
    --panel: #22252a; --blue: #56b4e9; --star: #ff9a56; --mark: #3a2a1d; }
}
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 1.7rem; margin: 0 0 .6rem; letter-spacing: -.01em; overflow-wrap: anywhere; }
h2 { font-size: 1.12rem; margin: 2.6rem 0 .7rem; padding-top: .9rem;
  border-top: 1px solid var(--grid); }
.chip { font-size: .75rem; font-weight: 600; padding: .15rem .6rem; border-radius: 1rem;
  vertical-align: middle; background: var(--panel); color: var(--soft); letter-spacing: 0; }
.chip.finished { color: var(--blue); }
.headline p { margin: .25rem 0; }
.headline code { font-size: .92em; white-space: normal; overflow-wrap: anywhere; }
.headline p:first-child { font-size: 1.12rem; font-weight: 600; color: var(--star); }
.note { color: var(--soft); font-size: .88rem; }
.scroll { overflow: auto; max-height: 60rem; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; color: var(--soft); border-bottom: 1px solid var(--soft); }
th, td { padding: .28rem .5rem; vertical-align: top; }
thead th { position: sticky; top: 0; background: var(--page); }
tr.first td { border-top: 1px solid var(--grid); }
thead + tbody tr:first-child td { border-top: 0; }
th.n, td.n { text-align: right; white-space: nowrap; }
tr.winner { background: var(--mark); }
tr.winner td.name { font-weight: 600; }
tr.anchor { background: var(--panel); }
pre { background: var(--panel); padding: .8rem 1rem; border-radius: 6px; overflow-x: auto;
  font-size: .85rem; line-height: 1.45; }
pre.command { display: inline-block; margin: .6rem 0 0; max-width: calc(100% - 2rem); }
code { font-size: .85rem; white-space: nowrap; }
ul { padding-left: 1.2rem; margin: .3rem 0 1rem; }
summary { cursor: pointer; color: var(--soft); }
.bar { display: inline-block; height: .7em; background: var(--blue); border-radius: 2px; }
.figure { width: 100%; min-height: 160px; }
"""
