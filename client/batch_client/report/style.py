"""How a report looks: one style sheet, for light and dark screens and for paper."""

from __future__ import annotations

__all__ = ["STYLE"]

# Okabe and Ito's palette, which colour-blind people tell apart (https://jfly.uni-koeln.de/color/); its yellow and black
# are replaced by a grey and a brown that show on both backgrounds.
_SERIES = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8C8C8C", "#8A6D3B")

STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --ink: #1b1b1b; --quiet: #5f6368; --line: #d9dce0; --mark: #b3261e;
  --soft: #f3f5f7; }
@media (prefers-color-scheme: dark) { :root { --page: #16181b; --ink: #e6e6e6; --quiet: #a2a8af; --line: #3a3f45;
  --mark: #ff9a8d; --soft: #212529; } }
@media print { :root { --page: #ffffff; --ink: #000000; --quiet: #444444; --line: #bbbbbb; --mark: #b3261e;
  --soft: #ffffff; color-scheme: light; } body { font-size: 11px; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, "Segoe UI", "DejaVu Sans",
  sans-serif; }
main { max-width: 780px; margin: 0 auto; padding: 24px 20px 48px; }
h1 { font-size: 1.5em; margin: 0 0 8px; overflow-wrap: anywhere; }
h2 { font-size: 1.1em; margin: 0 0 4px; }
section, figure { margin: 28px 0 0; break-inside: avoid; }
figcaption p { margin: 0 0 6px; color: var(--quiet); font-size: 0.9em; }
.verdict, .ending { margin: 12px 0 0; padding: 10px 14px; background: var(--soft); border-left: 4px solid #0072B2;
  overflow-wrap: anywhere; }
.ending { border-left-color: var(--mark); }
dl { margin: 0; columns: 3 200px; column-gap: 24px; }
dl.long { columns: auto; }
dl div { border-bottom: 1px solid var(--line); padding: 3px 0; break-inside: avoid; }
dt { color: var(--quiet); font-size: 0.85em; }
dd { margin: 0; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 0.9em; font-variant-numeric: tabular-nums; }
th { text-align: left; color: var(--quiet); font-weight: normal; }
th, td { padding: 4px 10px 4px 0; border-bottom: 1px solid var(--line); vertical-align: middle; }
img { width: 48px; image-rendering: pixelated; display: block; }
svg { display: block; width: 100%; height: auto; font-size: 12px; }
svg rect { shape-rendering: crispEdges; }
svg text { fill: var(--quiet); }
svg text.label, svg text.note { fill: var(--ink); }
svg text.inside { fill: #ffffff; font-weight: bold; }
svg .grid { stroke: var(--line); } svg .axis { stroke: var(--quiet); }
svg .mark { stroke: var(--mark); stroke-dasharray: 2 3; } svg .level { stroke: var(--ink); stroke-dasharray: 6 4; }
""" + "\n".join(f"svg .s{number} {{ fill: {colour}; }}" for number, colour in enumerate(_SERIES)) + "\n"
