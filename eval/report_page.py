"""The page of `report.html`: markup, style, the filter for completions. `report.py` fills in each `@@name@@`."""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>@@title@@</title>
<style>
  body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; }
  table { border-collapse: collapse; margin: .5rem 0 1.5rem; display: block; overflow-x: auto; }
  th, td { text-align: left; vertical-align: top; padding: .25rem .7rem .25rem 0; border-bottom: 1px solid #ddd; }
  svg { max-width: 100%; height: auto; }
  .filter { display: flex; flex-wrap: wrap; gap: .7rem; margin: 1rem 0; align-items: center; }
  .filter input { flex: 1 1 14rem; }
  details { border: 1px solid #ddd; border-left: 4px solid #b44; border-radius: 4px; }
  details { margin: .4rem 0; padding: .4rem .8rem; }
  details.correct { border-left-color: #2a7d4f; }
  pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f6f6f6; padding: .6rem; margin: .4rem 0; }
  summary { cursor: pointer; }
  summary span { color: #666; margin-left: .7rem; }
</style>
</head>
<body>
<h1>@@title@@</h1>
<h2>Scores</h2>
@@scores@@
@@plot@@
<h2>What was run</h2>
@@run@@
@@parts@@
<h2>Completions</h2>
<p>@@note@@</p>
<div class="filter">
  <label>Benchmark <select id="benchmark"><option value="">all</option></select></label>
  <label>Grade <select id="reason"><option value="">all</option></select></label>
  <label><input type="checkbox" id="truncated"> only truncated</label>
  <input type="search" id="text" placeholder="problem id or text" aria-label="problem id or text">
  <span id="count"></span>
</div>
<div id="list"></div>
<div class="filter"><button id="more">Show more</button></div>
<script type="application/json" id="data">@@samples@@</script>
<script>
"use strict";
const samples = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const PAGE = 50;
let matching = [], shown = 0;

function options(id, values) {
  for (const value of new Set(values)) byId(id).add(new Option(value, value));
}

function block(title, text) {
  const heading = document.createElement("strong"), body = document.createElement("pre");
  heading.textContent = title;
  body.textContent = text;
  return [heading, body];
}

function card(s) {
  const card = document.createElement("details"), summary = document.createElement("summary");
  const facts = document.createElement("span");
  if (s.correct) card.className = "correct";
  summary.textContent = `${s.benchmark} ${s.id} #${s.sample}`;
  facts.textContent = `${s.reason}, ${s.tokens} tokens${s.truncated ? ", truncated" : ""}, ` +
    `answer ${s.extracted ?? "none"}, gold ${s.answer}`;
  summary.append(facts);
  card.append(summary);
  card.addEventListener("toggle", () => {
    if (card.open && card.children.length === 1)
      card.append(...block("Prompt", s.prompt), ...block("Completion", s.completion));
  });
  return card;
}

function more() {
  byId("list").append(...matching.slice(shown, shown + PAGE).map(card));
  shown = Math.min(shown + PAGE, matching.length);
  byId("count").textContent = `${matching.length} of ${samples.length} completions, ${shown} shown`;
  byId("more").hidden = shown >= matching.length;
}

function filter() {
  const benchmark = byId("benchmark").value, reason = byId("reason").value;
  const truncated = byId("truncated").checked, text = byId("text").value.toLowerCase();
  matching = samples.filter((s) => (!benchmark || s.benchmark === benchmark) && (!reason || s.reason === reason) &&
    (!truncated || s.truncated) &&
    (!text || [s.id, s.prompt, s.completion].some((part) => part.toLowerCase().includes(text))));
  shown = 0;
  byId("list").replaceChildren();
  more();
}

options("benchmark", samples.map((s) => s.benchmark));
options("reason", samples.map((s) => s.reason));
for (const id of ["benchmark", "reason", "truncated", "text"]) byId(id).addEventListener("input", filter);
byId("more").addEventListener("click", more);
filter();
</script>
</body>
</html>
"""
