"""The style sheet of a report."""

STYLE = """
:root {
  color-scheme: light dark;
  --page: #ffffff; --ink: #1d2126; --soft: #5d6670; --grid: #c9ced4; --tint: #f5f6f8;
  --series-1: #2166ac; --series-2: #c9580c; --series-3: #2a8a5b; --series-4: #8a4fb0;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14171a; --ink: #e3e6e9; --soft: #9aa4ad; --grid: #434b53; --tint: #1d2226;
    --series-1: #79b1ea; --series-2: #f09a55; --series-3: #6cc796; --series-4: #c79be6;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 1120px; background: var(--page); color: var(--ink);
  font: 16px/1.5 Charter, "Bitstream Charter", Cambria, Georgia, serif; overflow-wrap: break-word;
}
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0; font-weight: 600; }
h2 { font-size: 1.3rem; margin: 3rem 0 .5rem; padding-top: 1rem; border-top: 1px solid var(--grid); font-weight: 600; }
h3 { font-size: 1.05rem; margin: 1.6rem 0 .5rem; font-weight: 600; }
p { margin: .4rem 0; max-width: 72ch; }
a { color: var(--series-1); text-decoration-thickness: 1px; text-underline-offset: 2px; }
.subtitle, .facts, .hint, figcaption, small { color: var(--soft); }
.facts, .hint { font-size: .9rem; max-width: none; }
.hint { margin-bottom: .9rem; }
nav { margin: 1rem 0 0; font-size: .95rem; }
nav a { margin-right: 1.2em; }
table, h4, .legend, .scale, .sample header, .beside header, svg { font-family: system-ui, sans-serif; }
.wide { overflow-x: auto; }
table { border-collapse: separate; border-spacing: 0; font-size: .875rem;
  font-variant-numeric: tabular-nums; width: 100%;
  border-top: 1.5px solid var(--ink); border-bottom: 1.5px solid var(--ink); }
th, td { padding: .38rem .7rem; text-align: right; white-space: nowrap; font-weight: 400; }
th:first-child { text-align: left; position: sticky; left: 0; background: var(--page); padding-left: 0; }
tbody th { font-weight: 500; }
thead th { border-bottom: 1px solid var(--ink); color: var(--soft); }
td:last-child, th:last-child { padding-right: 0; }
.texts td, .texts th { white-space: normal; overflow-wrap: anywhere; vertical-align: top; min-width: 3.5rem; }
.range { width: 9rem; min-width: 7rem; }
.range svg { display: block; width: 100%; height: 1rem; overflow: visible; }
.range .axis { stroke: var(--grid); }
.range .interval { stroke: var(--series-1); stroke-width: 7; stroke-opacity: .35; }
.range .share { stroke: var(--series-1); stroke-width: 2; }
.notes { font-size: .9rem; color: var(--soft); padding-left: 1.2em; max-width: 80ch; }
.panels { display: grid; gap: 0 1.75rem; margin-bottom: -1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 320px), 1fr)); }
figure { margin: 0; min-width: 0; display: grid; grid-row: span 4; grid-template-rows: subgrid; gap: 0;
  align-content: start; }
h4 { margin: 0; font-size: .875rem; font-weight: 600; }
h4 small { font-weight: 400; font-size: .8rem; margin-left: .35em; }
.legend { list-style: none; margin: .2rem 0 .3rem; padding: 0; font-size: .76rem; display: flex; flex-wrap: wrap;
  gap: .05rem .8rem; font-variant-numeric: tabular-nums; }
.legend i { display: inline-block; width: 1.1em; height: 3px; margin-right: .4em; vertical-align: .25em;
  background: var(--key); border-radius: 1px; }
.legend b { font-weight: 400; color: var(--soft); }
.series-1 { --key: var(--series-1); } .series-2 { --key: var(--series-2); }
.series-3 { --key: var(--series-3); } .series-4 { --key: var(--series-4); }
svg.plot { display: block; width: 100%; height: auto; }
svg.plot * { stroke-linejoin: round; }
figcaption { font-size: .84rem; line-height: 1.4; margin: .35rem 0 2rem; }
.scale { display: flex; align-items: center; gap: .5em; font-size: .78rem; color: var(--soft); margin: .2rem 0 .3rem; }
.scale i { flex: 0 0 7rem; height: .55rem; border: 1px solid var(--grid); }
.scale .diverging { background: linear-gradient(90deg, #2f7fc4, #2f7fc400 50%, #d9711c00 50%, #d9711c); }
.scale .rising { background: linear-gradient(90deg, #d9711c00, #d9711c); }
.no-data { color: var(--soft); font-style: italic; border: 1px dashed var(--grid); padding: 1.2rem; margin: .3rem 0;
  align-self: start; text-align: center; max-width: none; font-size: .9rem; }
.samples + .hint { margin-top: 1.2rem; }
.samples { display: grid; gap: 1.25rem 1.75rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 480px), 1fr)); }
.sample { border-left: 3px solid var(--grid); padding-left: .9rem; min-width: 0; }
.sample header { font-size: .8rem; color: var(--soft); font-variant-numeric: tabular-nums; }
.sample p { margin: .1rem 0 .3rem; white-space: pre-wrap; }
.beside { display: grid; gap: .6rem 1.25rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 280px), 1fr)); }
.beside header { font-size: .8rem; color: var(--soft); }
.question { margin: 0 0 1.8rem; }
pre { font: .8rem/1.45 ui-monospace, "SF Mono", Menlo, Consolas, monospace; background: var(--tint); margin: 0;
  padding: .6rem .8rem; white-space: pre-wrap; overflow-wrap: anywhere; max-height: 22rem; overflow-y: auto; }
details { margin-top: .5rem; }
summary { cursor: pointer; font-size: .95rem; padding: .2rem 0; }
@media (max-width: 480px) { body { padding: 1.5rem 1rem 3rem; } h1 { font-size: 1.45rem; }
  tbody th { white-space: normal; min-width: 8rem; } th:first-child { padding-right: .3rem; }
  .texts tbody th { min-width: 6rem; } .texts td { padding-right: .3rem; padding-left: .3rem; } }
@media print { pre { max-height: none; } figure, .sample, .beside > div { break-inside: avoid; } }
"""
