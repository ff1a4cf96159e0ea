"""The page on which a person judges: one pair at a time, by mouse, touch or keyboard.

Everything that a model wrote is put in as text, never as HTML, and the page asks no other server.
"""

from __future__ import annotations

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>mergesearch: which do you prefer?</title>
<link rel="stylesheet" href="judge.css">
<link rel="icon" href="data:,">
<body>
<header>
<h1 id="question">Which do you prefer?</h1>
<p id="progress" role="status">Loading</p>
<progress id="bar" value="0" max="1" aria-label="Pairs judged"></progress>
</header>
<main>
<p id="message" role="alert" hidden></p>
<div id="pair" hidden>
<section aria-labelledby="asked"><h2 id="asked">Prompt</h2>
<div id="prompt" class="output"></div></section>
<div class="sides">
<section aria-labelledby="one"><h2 id="one">Left</h2>
<div id="left" class="output"></div></section>
<section aria-labelledby="two"><h2 id="two">Right</h2>
<div id="right" class="output"></div></section>
</div>
</div>
</main>
<footer>
<button id="choose-left" data-choice="left" disabled>Left <kbd>&larr;</kbd></button>
<button id="choose-tie" data-choice="tie" disabled>Tie <kbd>&darr;</kbd></button>
<button id="choose-right" data-choice="right" disabled>Right <kbd>&rarr;</kbd></button>
<button id="undo" disabled>Undo <kbd>U</kbd></button>
</footer>
<script src="judge.js"></script>
</body>
</html>
"""

STYLE = """
:root { color-scheme: light dark; --back: #ffffff; --text: #1b1d22; --quiet: #50555f;
  --line: #c3c8d0; --pane: #f5f6f8; --button: #1f4f99; --on-button: #ffffff; --alarm: #8c1d18; }
@media (prefers-color-scheme: dark) { :root { --back: #15171b; --text: #eceef2; --quiet: #b3b9c4;
  --line: #454b57; --pane: #1f2228; --button: #8ab4f8; --on-button: #10131a; --alarm: #ffb4ab; } }
* { box-sizing: border-box; }
body { margin: 0; min-height: 100vh; display: flex; flex-direction: column;
  background: var(--back); color: var(--text); font: 1rem/1.5 system-ui, sans-serif; }
header, main, footer { width: 100%; max-width: 80rem; margin: 0 auto; padding: 0.75rem 1rem; }
main { flex: 1; }
h1 { margin: 0; font-size: 1.3rem; }
h2 { margin: 0 0 0.3rem; font-size: 0.95rem; color: var(--quiet); }
header p { margin: 0.2rem 0; color: var(--quiet); }
progress { width: 100%; height: 0.5rem; accent-color: var(--button); }
section { margin-bottom: 1rem; min-width: 0; }
.output { border: 1px solid var(--line); border-radius: 0.4rem; background: var(--pane);
  padding: 0.75rem; white-space: pre-wrap; overflow-wrap: anywhere; }
.output img { display: block; max-width: 100%; height: auto; margin: 0 auto; }
.output.empty { color: var(--quiet); font-style: italic; }
.sides { display: grid; gap: 1rem; grid-template-columns: 1fr; }
@media (min-width: 700px) { .sides { grid-template-columns: 1fr 1fr; } }
#message { color: var(--alarm); font-weight: 600; }
footer { position: sticky; bottom: 0; display: grid; gap: 0.5rem;
  grid-template-columns: repeat(3, 1fr) auto; background: var(--back);
  border-top: 1px solid var(--line); }
button { min-height: 2.75rem; padding: 0 0.6rem; border: 1px solid var(--button);
  border-radius: 0.4rem; background: var(--button); color: var(--on-button); font: inherit; }
#undo { background: var(--back); color: var(--text); border-color: var(--line); }
button:disabled { background: var(--pane); color: var(--quiet); border-color: var(--line); }
button:focus-visible { outline: 3px solid var(--text); outline-offset: 2px; }
kbd { font: inherit; }
[hidden] { display: none !important; }
"""

SCRIPT = """
"use strict";
const byId = (id) => document.getElementById(id);
const choosers = [...document.querySelectorAll("button[data-choice]")];
let view = null;
let busy = false;

function fill(place, shown) {
  place.replaceChildren();
  place.classList.toggle("empty", shown.kind === "text" && shown.text.trim() === "");
  if (shown.kind === "text") {
    place.textContent = shown.text.trim() === "" ? "(an empty text)" : shown.text;
    return;
  }
  const picture = document.createElement("img");
  picture.src = "picture/" + encodeURIComponent(shown.text);
  picture.alt = place.id === "left" ? "the left picture" : "the right picture";
  place.append(picture);
}

function complain(text) {
  byId("message").textContent = text;
  byId("message").hidden = text === "";
}

function show(next) {
  const another = view !== null && view.pair !== next.pair;
  view = next;
  const open = next.state === "open";
  const said = { open: "", waiting: ". The next outputs are being made",
    over: ". The study has stopped: start it again to go on" }[next.state];
  byId("progress").textContent = next.done + " of " + next.total + " pairs judged" + said;
  byId("bar").max = Math.max(next.total, 1);
  byId("bar").value = next.done;
  byId("pair").hidden = !open;
  if (open) {
    byId("question").textContent = next.question;
    fill(byId("prompt"), { kind: "text", text: next.prompt });
    fill(byId("left"), next.left);
    fill(byId("right"), next.right);
  }
  for (const button of choosers) button.disabled = !open;
  byId("undo").disabled = !next.undo;
  if (another) window.scrollTo(0, 0);
  document.body.dataset.state = next.state;
  document.body.dataset.pair = next.pair;
}

function over() {
  show({ ...(view ?? { done: 0, total: 0 }), state: "over", undo: false, pair: "" });
}

async function ask(path, body) {
  const answer = await fetch(path, body === undefined ? {} : {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });
  if (!answer.ok) throw new Error(await answer.text());
  return answer.json();
}

async function send(path, body) {
  if (busy) return;
  busy = true;
  try {
    show(await ask(path, body));
    complain("");
  } catch (error) {
    if (error instanceof TypeError) over();
    else complain(error.message);
  } finally {
    busy = false;
  }
}

function choose(choice) {
  if (view !== null && view.state === "open") send("choice", { pair: view.pair, choice });
}

async function follow() {
  try {
    show(await ask("view"));
    while (view.state !== "over") {
      const next = await ask("view?since=" + view.version);
      if (!busy && next.version > view.version) show(next);
    }
  } catch (error) {
    over();
  }
}

for (const button of choosers) {
  button.addEventListener("click", () => choose(button.dataset.choice));
}
byId("undo").addEventListener("click", () => send("undo", {}));
document.addEventListener("keydown", (event) => {
  if (event.repeat || event.ctrlKey || event.metaKey || event.altKey) return;
  const choice = { ArrowLeft: "left", ArrowRight: "right", ArrowDown: "tie" }[event.key];
  if (choice !== undefined) {
    event.preventDefault();
    choose(choice);
  } else if (event.key.toLowerCase() === "u" && !byId("undo").disabled) send("undo", {});
});
follow();
"""
