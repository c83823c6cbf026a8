"""What does a report look like? The page's only style sheet: phone, desktop, light, dark and paper."""

STYLE_SHEET = """
:root {
  color-scheme: light dark;
  --page: #f5f6f8; --card: #ffffff; --ink: #1b2330; --muted: #5a6475; --line: #e1e5ea; --edge: #1b233033;
  --baseline: #8592a6; --slim: #0f766e; --mark: #c2410c;
  --run-1: #0f766e; --run-2: #c2410c; --run-3: #2563eb; --run-4: #7c3aed; --run-5: #be185d; --run-6: #4d7c0f;
  --pass: #14763a; --pass-soft: #e7f6ec; --fail: #b42318; --fail-soft: #fdecea; --skip: #5b6270; --skip-soft: #eef0f3;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --page: #10141a; --card: #181e27; --ink: #e6eaf0; --muted: #9aa6b8; --line: #2b3441; --edge: #000000aa;
    --baseline: #8593a8; --slim: #2dd4bf; --mark: #fb923c;
    --run-1: #2dd4bf; --run-2: #fb923c; --run-3: #60a5fa; --run-4: #a78bfa; --run-5: #f472b6; --run-6: #a3e635;
    --pass: #4ade80; --pass-soft: #12291b; --fail: #f98b81; --fail-soft: #34181a; --skip: #a3adbb; --skip-soft: #232b36;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 1.5rem 1rem 3rem; max-width: 68rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
  -webkit-text-size-adjust: 100%;
}
h1 { font-size: 1.5rem; line-height: 1.2; margin: 0 0 1rem; overflow-wrap: anywhere; }
h1 small { display: block; font-size: 0.85rem; font-weight: 500; color: var(--muted); letter-spacing: 0.02em; }
h2 { font-size: 1.12rem; margin: 0 0 0.75rem; overflow-wrap: anywhere; }
p { margin: 0.5rem 0; max-width: 48rem; overflow-wrap: anywhere; }
code, pre { font: 0.86em/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
code { overflow-wrap: anywhere; }
section, .verdict {
  margin: 0 0 1rem; padding: 1.1rem 1.25rem;
  background: var(--card); border: 1px solid var(--line); border-radius: 10px;
}
.verdict { border-left: 6px solid var(--tone); background: var(--soft); }
.verdict h2 { font-size: 1.35rem; margin: 0; color: var(--tone); }
.verdict p { margin: 0.25rem 0 0; }
.verdict ul, .notes { margin: 0.5rem 0 0; padding-left: 1.2rem; }
.verdict li, .notes li { margin: 0.2rem 0; overflow-wrap: anywhere; }
.warn, .inconclusive { --tone: var(--mark); --soft: var(--card); }
.pass { --tone: var(--pass); --soft: var(--pass-soft); }
.fail { --tone: var(--fail); --soft: var(--fail-soft); }
.skipped { --tone: var(--skip); --soft: var(--skip-soft); }
.badge {
  display: inline-block; min-width: 4.2em; text-align: center; padding: 0.05em 0.6em; border-radius: 99px;
  font-size: 0.8rem; font-weight: 600; color: var(--tone); background: var(--soft); border: 1px solid var(--tone);
}
.muted, figcaption { color: var(--muted); font-size: 0.88rem; }
.scroll {
  overflow-x: auto; max-width: 100%;
  background: linear-gradient(to right, var(--card) 30%, transparent) left / 2.5rem 100% no-repeat local,
    linear-gradient(to left, var(--card) 30%, transparent) right / 2.5rem 100% no-repeat local,
    linear-gradient(to right, var(--edge), transparent) left / 0.8rem 100% no-repeat scroll,
    linear-gradient(to left, var(--edge), transparent) right / 0.8rem 100% no-repeat scroll;
}
:is(.scroll, figure, h3) + .scroll { margin-top: 0.9rem; }
table { border-collapse: collapse; width: 100%; font-size: 0.92rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.42rem 1.25rem 0.42rem 0; text-align: left; vertical-align: top; }
th, td { border-bottom: 1px solid var(--line); }
th:last-child, td:last-child { padding-right: 0; }
thead th { color: var(--muted); font-weight: 600; font-size: 0.82rem; white-space: nowrap; vertical-align: bottom; }
tbody th { font-weight: 600; white-space: nowrap; }
tbody tr:last-child > * { border-bottom: 0; }
.whole { white-space: nowrap; }
.number { text-align: right; white-space: nowrap; }
.text { min-width: 14rem; overflow-wrap: anywhere; }
.runs :is(th, td) { min-width: 6rem; white-space: normal; overflow-wrap: break-word; }
.runs small { white-space: nowrap; }
.runs :is(th, td):first-child {
  position: sticky; left: 0; background: var(--card); min-width: 7rem; overflow-wrap: anywhere;
}
.verdicts ul { margin: 0.25rem 0 0; padding-left: 1.1rem; }
.gain { color: var(--pass); font-weight: 600; }
.loss { color: var(--fail); font-weight: 600; }
.share { display: block; width: 100%; min-width: 6rem; height: 0.6rem; margin-top: 0.45rem; }
.share rect { fill: var(--baseline); opacity: 0.35; }
.share rect + rect { fill: var(--slim); opacity: 1; }
.facts { display: flex; flex-wrap: wrap; gap: 0.6rem 1.75rem; margin: 0 0 0.75rem; }
.facts dt { color: var(--muted); font-size: 0.8rem; }
.facts dd { margin: 0; font-weight: 600; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
section > :last-child { margin-bottom: 0; }
figure { margin: 0.5rem 0 0; }
@media screen and (min-width: 56rem) {
  .split { display: grid; grid-template-columns: minmax(0, 36rem) minmax(0, 1fr); gap: 0 2.5rem; align-items: start; }
  .split figure { grid-area: 1 / 1; margin-top: 0; }
  .split .facts { grid-area: 1 / 2; flex-direction: column; }
}
h3 { font-size: 0.98rem; margin: 1rem 0 0.5rem; overflow-wrap: anywhere; }
small.muted { font-weight: 400; }
.images { display: grid; grid-template-columns: repeat(auto-fill, minmax(6rem, 1fr)); gap: 0.9rem 0.75rem; }
.images figure { margin: 0; }
.images img { display: block; width: 5rem; height: 5rem; object-fit: contain; image-rendering: pixelated; }
.images img { background: var(--page); border: 1px solid var(--line); border-radius: 6px; }
.images figcaption { font-size: 0.78rem; line-height: 1.35; overflow-wrap: anywhere; }
.images figcaption .muted { display: block; font-size: inherit; }
figcaption { margin-top: 0.25rem; }
.plot { display: block; width: 100%; max-width: 36rem; height: auto; }
.plot * { stroke-linejoin: round; stroke-linecap: butt; }
details { margin-top: 0.75rem; }
summary { cursor: pointer; color: var(--muted); font-size: 0.92rem; }
details > :not(summary) { margin-top: 0.5rem; }
pre { margin: 0; padding: 0.75rem; overflow-x: auto; background: var(--page); }
pre { border: 1px solid var(--line); border-radius: 6px; }
@media (max-width: 40rem) {
  body { padding: 0.75rem 0.6rem 2rem; }
  section, .verdict { padding: 0.85rem 0.8rem; }
  table { font-size: 0.86rem; }
  th, td { padding-right: 0.7rem; }
  tbody th { white-space: normal; overflow-wrap: anywhere; min-width: 6.2rem; }
  .comparison tbody th { overflow-wrap: break-word; min-width: 0; }
  .stacked thead { display: none; }
  .stacked tr { display: grid; grid-template-columns: auto 1fr; gap: 0.15rem 1rem; padding: 0.5rem 0; }
  .stacked tr { border-bottom: 1px solid var(--line); }
  .stacked tr:last-child { border-bottom: 0; }
  .stacked tr > * { border: 0; padding: 0; text-align: left; }
  .stacked tr > :nth-child(2) { justify-self: end; }
  .stacked tr > :last-child { grid-column: 1 / -1; }
  .checks tr > :nth-child(3)::before { content: "value "; color: var(--muted); }
  .checks tr > :nth-child(4)::before { content: "limit "; color: var(--muted); }
  .comparison :is(th, td):nth-child(4) { padding-right: 0; white-space: normal; }
  .comparison :is(th, td):nth-child(5) { display: none; }
}
@media print {
  body { background: none; padding: 0; max-width: none; font-size: 11pt; }
  section, .verdict { border-color: #bbb; print-color-adjust: exact; }
  .verdict, figure, tr, li, dl { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
  .scroll, pre { overflow: visible; background: none; }
  pre { white-space: pre-wrap; }
  details:has(pre)::details-content { content-visibility: visible; display: block; height: auto; }
}
"""
