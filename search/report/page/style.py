"""The style sheet inside the HTML pages of reports."""

from __future__ import annotations

STYLE = """
:root { color-scheme: light dark; --ink: #202124; --soft: #5f6368; --grid: #e3e5e8; --page: #ffffff;
  --panel: #f6f7f9; --blue: #0072b2; --star: #b84a00; --mark: #fdf1e7;
  --veil: rgba(255,255,255,.75); }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8eaed; --soft: #a2a8b0; --grid: #3a3f45; --page: #17191c;
    --panel: #22252a; --blue: #56b4e9; --star: #ff9a56; --mark: #3a2a1d;
    --veil: rgba(23,25,28,.75); }
}
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 32px 24px 64px; }
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
.bar.below { background: var(--star); }
.figure { width: 100%; min-height: 160px; }
:focus-visible { outline: 2px solid var(--blue); outline-offset: 2px; }
.explore { display: grid; grid-template-columns: minmax(0, 1fr) 340px; gap: 0 28px; }
.panel { position: sticky; top: 12px; align-self: start; box-sizing: border-box; margin-top: 2.6rem;
  max-height: calc(100vh - 24px); overflow: auto; padding: .8rem 1rem; border-radius: 8px;
  background: var(--panel); font-size: .9rem; }
.panel h3 { font-size: 1rem; margin: .8rem 0 .4rem; overflow-wrap: anywhere; }
.panel h4 { font-size: .9rem; margin: .9rem 0 .2rem; color: var(--soft); font-weight: 600; }
.panel table { width: 100%; }
.panel .scores td { white-space: nowrap; font-size: .93em; }
.panel thead th { background: transparent; position: static; }
.panel th, .panel td { padding: .1rem .3rem .1rem 0; overflow-wrap: anywhere; }
.panel pre { background: var(--page); white-space: pre-wrap; overflow-wrap: anywhere;
  margin: .2rem 0 0; padding: .5rem .6rem; }
.panel .told p { margin: .9rem 0 0; }
.panel fieldset { border: 1px solid var(--grid); border-radius: 6px; margin: 0; min-width: 0; }
.panel fieldset label { display: grid; grid-template-columns: 7em minmax(0, 1fr) 3.2em; gap: .5em;
  align-items: center; }
.panel fieldset span { overflow-wrap: anywhere; }
.panel output { text-align: right; font-variant-numeric: tabular-nums; }
.panel fieldset p { margin: .4rem 0 0; }
.panel input[type=range] { width: 100%; accent-color: var(--blue); }
.pick { display: flex; flex-wrap: wrap; gap: .4rem .8rem; margin: .8rem 0 0; }
.pick select { max-width: 11em; }
.pick input { width: 5em; }
button, select, input { font: inherit; color: var(--ink); background: var(--page);
  border: 1px solid var(--soft); border-radius: 4px; padding: .1rem .5rem; }
button { cursor: pointer; }
@media (max-width: 960px) {
  .explore { grid-template-columns: minmax(0, 1fr); }
  .panel { position: static; max-height: none; margin-top: 1rem; }
}
@media (max-width: 640px) {
  main { padding: 16px 14px 40px; }
  pre.command { display: block; max-width: none; white-space: pre-wrap; overflow-wrap: anywhere; }
  .results table, .results tbody { display: block; }
  .results thead { display: none; }
  .results tbody { display: flex; flex-direction: column; }
  .results tr { display: grid; grid-template-columns: 2.2em minmax(0, 1fr) auto;
    padding: .1rem .3rem; }
  .results tr.winner { order: -1; }
  .results tr.first .objective { grid-column: 1 / -1; }
  .results td { border: 0 !important; padding: .1rem .2rem; }
  .results tr.first { border-top: 1px solid var(--grid); padding-top: .4rem; }
  .results td.n { text-align: left; }
  .results td.marks { grid-row: 1; grid-column: 3; }
  .results td.objective { grid-column: 1 / -1; color: var(--soft); }
  .results td[data-label] { grid-column: 1 / -1; display: flex; gap: .6em; padding-left: 1.2rem; }
  .results td[data-label]::before { content: attr(data-label); color: var(--soft); width: 6em; }
}
"""
