"""The page's style: a table on a wide screen, cards on a phone, light or dark as the visitor is."""

from __future__ import annotations

_COLOURS = """
:root {
  color-scheme: light dark;
  --ground: #f4f5f7; --panel: #fff; --head: #eceef1; --line: #dde1e6;
  --text: #1c2127; --dim: #59636e;
  --ok: #1a7539; --bad: #b9222f; --warn: #875000; --run: #0b5cad;
  --bad-ground: #fdf1f1; --bad-line: #e9b8bb;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #0f1317; --panel: #171c22; --head: #1f252c; --line: #2c343d;
    --text: #e6e9ed; --dim: #9aa6b2;
    --ok: #57c278; --bad: #ff8a85; --warn: #e6b056; --run: #74b8ff;
    --bad-ground: #251a1d; --bad-line: #6d373b;
  }
}
.ok { color: var(--ok); }
.bad { color: var(--bad); }
.warn { color: var(--warn); }
.run { color: var(--run); }
.dim, .when { color: var(--dim); }
"""

_FRAME = """
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0 auto; max-width: 100rem; padding: 0 1.25rem 3rem; background: var(--ground);
  color: var(--text); font: 14px/1.4 system-ui, sans-serif; font-variant-numeric: tabular-nums;
}
code, pre { font: 0.93em/1.4 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; }
code, pre, q, .why, .error, .schedule {
  overflow-wrap: anywhere; unicode-bidi: isolate;
}
h1 { font-size: 1.4rem; margin: 0; overflow-wrap: anywhere; }
h1 small { font-weight: 400; color: var(--dim); }
h2 { font-size: 1rem; margin: 0; }
a { color: var(--run); }
.unseen {
  position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%);
  white-space: nowrap;
}
header {
  display: flex; flex-wrap: wrap; align-items: center; gap: 0.5rem 1.5rem; padding: 1rem 0;
}
header form { display: flex; flex-wrap: wrap; align-items: center; gap: 0.5rem; }
header .read { margin: 0 0 0 auto; color: var(--dim); }
input, button {
  font: inherit; color: inherit; background: var(--panel); border: 1px solid var(--dim);
  border-radius: 6px; padding: 0.35rem 0.6rem; min-width: 0;
}
input { width: 16rem; }
button { cursor: pointer; }
:focus-visible { outline: 2px solid var(--run); outline-offset: 2px; }
#stale {
  position: fixed; z-index: 2; left: 0; right: 0; bottom: 0; margin: 0; padding: 0.75rem 1.25rem;
  background: #8c1420; color: #fff; font-weight: 600; overflow-wrap: anywhere;
}
.old main { filter: grayscale(1); }
footer { color: var(--dim); margin-top: 1rem; }
.none, .away { background: var(--panel); border: 1px solid var(--line); border-radius: 8px; }
.none { margin: 0; padding: 2rem 1rem; text-align: center; color: var(--dim); }
.away {
  background: var(--bad-ground); border-color: var(--bad); border-left-width: 6px;
  padding: 1rem 1.25rem; max-width: 60rem;
}
.away h2 { color: var(--bad); font-size: 1.2rem; }
"""

_TOP = """
.top {
  display: grid; grid-template-columns: 13rem minmax(0, 1fr); gap: 1rem;
  margin-bottom: 1.25rem;
}
.summary ul { list-style: none; margin: 0; padding: 0; display: grid; gap: 0.5rem; height: 100%; }
.summary li {
  background: var(--panel); border: 1px solid var(--line); border-radius: 8px;
  padding: 0.4rem 1rem; display: flex; gap: 0.5rem; align-items: center;
}
.summary li b { font-size: 1.6rem; line-height: 1.2; }
.summary li.bad { background: var(--bad-ground); border-color: var(--bad); }
.beat {
  background: var(--panel); border: 1px solid var(--line); border-radius: 8px;
  padding: 0.75rem 1rem;
}
.beat h2 { float: left; margin-right: 1rem; }
.beat .none { border: 0; padding: 0; text-align: left; }
.leader { margin: 0 0 0.5rem; overflow-wrap: anywhere; }
"""

_TABLES = """
table { border-collapse: collapse; width: 100%; text-align: left; }
th, td { vertical-align: top; padding: 0.45rem 0.6rem; font-weight: 400; }
thead th { color: var(--dim); font-size: 0.86em; padding-block: 0.3rem; }
caption { text-align: left; color: var(--dim); font-size: 0.86em; }
.number { text-align: right; }
.label { display: none; }
.entries th, .entries td { padding: 0.2rem 0.6rem 0.2rem 0; border-top: 1px solid var(--line); }
.entries thead th { border: 0; }
.entries .task { color: var(--dim); }
.over {
  display: flex; flex-wrap: wrap; align-items: baseline; gap: 0.25rem 1rem;
  margin-bottom: 0.5rem;
}
.count { margin: 0; color: var(--dim); overflow-wrap: anywhere; }
.singletons { background: var(--panel); border: 1px solid var(--line); table-layout: fixed; }
.singletons thead th {
  position: sticky; top: 0; z-index: 1; background: var(--head);
  box-shadow: inset 0 -1px var(--line);
}
.singletons tbody tr { border-top: 1px solid var(--line); }
.singletons tr { --edge: transparent; color: inherit; }
.singletons tr.bad { --edge: var(--bad); background: var(--bad-ground); }
.singletons tr.warn { --edge: var(--warn); }
.singletons tr.run { --edge: var(--run); }
.marks { box-shadow: inset 4px 0 var(--edge); }
.singletons tr > :first-child { padding-left: 0.9rem; }
.singletons thead th:nth-child(1) { width: 7rem; }
.singletons thead th:nth-child(3) { width: 21%; }
.singletons thead th:nth-child(4) { width: 6.4rem; }
.singletons thead th:nth-child(5) { width: 18.5%; }
.singletons thead th:nth-child(6) { width: 18%; }
.mark { display: block; font-weight: 600; }
.name b { font-weight: 600; }
.name .arguments { display: inline-block; color: var(--dim); }
.why, .lease .holder, .when, .error { display: block; }
.why, .error, .when { font-size: 0.93em; }
.outcome { font-weight: 600; }
.fence .when, .last .dim { white-space: nowrap; }
.error { color: var(--bad); }
details { font-size: 0.93em; }
summary { cursor: pointer; color: var(--dim); width: max-content; }
pre { margin: 0.25rem 0 0; white-space: pre-wrap; max-height: 16rem; overflow: auto; }
"""

_TIME_LINES = """
.line { display: block; width: 100%; height: 24px; }
.key { width: 8px; height: 18px; margin-right: 0.35rem; vertical-align: -4px; }
.ends {
  display: flex; justify-content: space-between; gap: 0.5rem; color: var(--dim);
  font-size: 0.82em;
}
.legend {
  display: flex; flex-wrap: wrap; gap: 0.15rem 1rem; list-style: none; margin: 0 0 0 auto;
  padding: 0;
  color: var(--dim); font-size: 0.86em;
}
svg path { vector-effect: non-scaling-stroke; stroke: var(--panel); stroke-width: 0.6; }
svg .ok { fill: var(--ok); }
svg .failed { fill: var(--bad); }
svg .retried { fill: var(--warn); }
svg .other { fill: var(--dim); }
svg .lost { fill: none; stroke: var(--bad); stroke-width: 2; }
svg .now { fill: var(--run); fill-opacity: 0.25; stroke: var(--run); stroke-width: 1.5; }
svg .axis { stroke: var(--dim); stroke-width: 1; fill: none; }
svg .gap { stroke-dasharray: 3 4; }
"""

_NARROW = """
@media (max-width: 60rem) {
  .top { grid-template-columns: minmax(0, 1fr); }
  .summary ul { grid-template-columns: repeat(3, 1fr); }
  .summary li { flex-wrap: wrap; gap: 0 0.5rem; padding: 0.4rem 0.75rem; }
  .singletons, .singletons tbody, .entries, .entries tbody { display: block; }
  thead { display: none; }
  .legend { margin: 0; }
  .label { display: inline; color: var(--dim); }
  .singletons { background: none; border: 0; }
  .singletons tbody tr {
    display: grid; gap: 0.25rem 1rem; margin-bottom: 0.6rem; padding: 0.6rem 0.75rem 0.6rem 1rem;
    grid-template: "marks name runs" auto "fence lease last" 1fr / 7rem 1fr 1fr;
    background: var(--panel); border: 1px solid var(--line); border-left-width: 4px;
    border-radius: 8px;
  }
  .singletons tbody tr { border-left-color: var(--edge); }
  .singletons tbody tr.ok { border-left-color: var(--line); }
  .singletons tbody tr.bad {
    border-block-color: var(--bad-line); border-right-color: var(--bad-line);
    background: var(--bad-ground);
  }
  .singletons tbody tr > *, .singletons tbody tr > :first-child { display: block; padding: 0; }
  .marks { grid-area: marks; box-shadow: none; }
  .singletons tbody th { grid-area: name; }
  .runs { grid-area: runs; }
  .fence { grid-area: fence; text-align: left; }
  .lease { grid-area: lease; }
  .last { grid-area: last; }
  .entries tr {
    display: flex; flex-wrap: wrap; gap: 0 0.9rem; padding: 0.35rem 0;
    border-top: 1px solid var(--line);
  }
  .entries tbody th, .entries tbody td { display: block; padding: 0; border: 0; }
  .entries tbody th { flex: 1 1 100%; }
  .entries caption { display: block; }
}
@media (max-width: 40rem) {
  .singletons tbody tr {
    grid-template: "marks fence" "name name" "lease lease" "last last" "runs runs" / 1fr auto;
  }
  .mark { display: inline; margin-right: 0.5rem; }
  .entries .lasttick, .entries .sent, .entries .zero { display: none; }
  .summary li { flex-direction: column; align-items: flex-start; }
  .fence .when, .last .when { display: inline; margin-left: 0.4rem; }
  body { padding-inline: 0.75rem; }
  header form { flex: 1 1 100%; }
  header label { display: none; }
  header input { flex: 1 1 8rem; width: 0; font-size: 16px; }
  header .read { margin: 0; }
}
"""

STYLE = _COLOURS + _FRAME + _TOP + _TABLES + _TIME_LINES + _NARROW
