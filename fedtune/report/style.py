"""The report's style sheet: one column, system fonts, light and dark, phone and desktop."""

from __future__ import annotations

from fedtune.report.curves import PALETTE

__all__ = ["style_sheet"]

RULES = """
:root{color-scheme:light dark;--bg:#f6f7f9;--card:#fff;--ink:#15191e;--soft:#5a6470;
--rule:#e3e6ea;--grid:#eceef1;--good:#0a7a55;--bad:#b3400a;--warnbg:#fdf1ea;--fade:#0b16221f}
@media (prefers-color-scheme:dark){:root{--bg:#0e1114;--card:#161a1f;--ink:#e9ecef;--soft:#98a2ad;
--rule:#282e35;--grid:#232930;--good:#46c79b;--bad:#f39a68;--warnbg:#2b1d14;--fade:#00000080}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;text-size-adjust:100%}
body{margin:0;background:var(--bg);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans","Liberation Sans",sans-serif;
overflow-wrap:anywhere}
main{max-width:1120px;margin:0 auto;padding:40px 24px 64px}
.eyebrow{margin:0 0 8px;color:var(--soft);font-size:13px}
.eyebrow b{color:var(--ink);font-weight:600}
h1{margin:0;max-width:24em;font-size:32px;line-height:1.2;letter-spacing:-.018em;font-weight:650;
text-wrap:balance}
h2{margin:0 0 4px;font-size:18px;line-height:1.3;letter-spacing:-.008em;font-weight:620}
h3{margin:0 0 4px;font-size:14px;font-weight:600}
p.note,ul.note,figcaption{margin:0 0 16px;max-width:72ch;color:var(--soft);font-size:13.5px}
.chips{display:flex;flex-wrap:wrap;gap:6px 20px;margin:16px 0 0;padding:0;list-style:none;
color:var(--soft);font-size:13.5px}
.chips b{color:var(--ink);font-weight:550}
.concerns{margin:18px 0 0;padding:12px 16px 12px 34px;background:var(--warnbg);
border:1px solid var(--rule);border-radius:10px;color:var(--bad);font-size:14px}
.reason{max-width:76ch;color:var(--bad);overflow-wrap:anywhere}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(168px,1fr));gap:12px;
margin:28px 0 12px}
.card,section,details{background:var(--card);border:1px solid var(--rule);border-radius:10px}
.card{padding:14px 16px 15px}
.card p{margin:0;color:var(--soft);font-size:13px;line-height:1.4}
.card p.big{margin:3px 0 3px;color:var(--ink);font-size:27px;line-height:1.15;font-weight:620;
letter-spacing:-.02em;font-variant-numeric:tabular-nums}
.card.good p.big{color:var(--good)}
.card.bad{background:var(--warnbg)}
.card.bad p.big{color:var(--bad)}
section{margin:12px 0 0;padding:22px 24px 24px;min-width:0}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(400px,100%),1fr));gap:0 12px}
.pair section{padding-bottom:16px}
figure{margin:0}
svg{display:block;width:100%;height:auto}
svg text{font:13px system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans","Liberation Sans",
sans-serif;fill:var(--soft);font-variant-numeric:tabular-nums}
svg .tick{font-size:12px}
svg .axis{font-size:12px}
svg .end,svg .value{fill:var(--ink)}
svg .value{font-weight:620}
.grid,.zero{stroke:var(--grid);stroke-width:1}
.zero{stroke:var(--soft);stroke-opacity:.6}
.line{fill:none;stroke:var(--tone);stroke-width:2;stroke-linejoin:round;stroke-linecap:round}
.line.t-federated{stroke-width:2.75}
.dashed{stroke-dasharray:5 5;stroke-width:1.75}
.band{fill:var(--tone);opacity:.13}
.lead{fill:none;stroke:var(--tone);stroke-width:1.5;stroke-opacity:.7}
.far{stroke-dasharray:1 4}
.dot{fill:var(--tone);stroke:var(--card);stroke-width:1.5}
.legend{display:none;flex-wrap:wrap;gap:4px 16px;margin:0 0 12px;padding:0;list-style:none;
font-size:13.5px}
.key{display:inline-block;width:14px;height:4px;margin:0 7px 3px 0;border-radius:2px;
background:var(--tone)}
.legend b,.bar-legend b{font-weight:600;font-variant-numeric:tabular-nums}
.narrow{display:none}
.scroll{overflow-x:auto;margin:0 -24px;padding:0 24px;
background:linear-gradient(90deg,var(--card) 30%,transparent) 0 0/40px 100% local no-repeat,
linear-gradient(270deg,var(--card) 30%,transparent) 100% 0/40px 100% local no-repeat,
linear-gradient(90deg,var(--fade),transparent) 0 0/14px 100% scroll no-repeat,
linear-gradient(270deg,var(--fade),transparent) 100% 0/14px 100% scroll no-repeat}
.scroll:focus-visible,summary:focus-visible{outline:2px solid var(--soft);outline-offset:-2px}
table{width:100%;border-collapse:collapse;font-size:14px;font-variant-numeric:tabular-nums}
th{padding:6px 12px 7px;color:var(--soft);font-size:12.5px;font-weight:500;text-align:left;
vertical-align:bottom;white-space:nowrap}
th,td{overflow-wrap:normal}
td{padding:8px 12px;border-top:1px solid var(--rule);vertical-align:top}
th:first-child,td:first-child{padding-left:0}
th:last-child,td:last-child{padding-right:0}
.n{text-align:right;white-space:nowrap}
td.n{font-variant-numeric:tabular-nums}
.name{min-width:9em;overflow-wrap:anywhere}
td.long{min-width:15em;overflow-wrap:anywhere}
td .sub{display:block;color:var(--soft);font-size:12.5px}
tr.us td{font-weight:600}
tr.us .sub{font-weight:400}
.good{color:var(--good)}
.bad{color:var(--bad)}
.soft{color:var(--soft)}
.bar{display:flex;gap:2px;height:10px;margin:6px 0 8px;border-radius:5px;overflow:hidden}
.bar i{display:block;min-width:2px;background:var(--tone)}
.bar-legend{display:flex;flex-wrap:wrap;gap:2px 18px;margin:0 0 20px;padding:0;list-style:none;
font-size:13.5px;color:var(--soft)}
.bar-legend b{color:var(--ink)}
td .bar{width:150px;margin:6px 0 4px}
h3.later{margin-top:26px}
details{margin:12px 0 0;padding:0 24px}
summary{margin:0 -24px;padding:14px 24px;cursor:pointer;font-weight:600;border-radius:10px}
details .scroll{padding-bottom:18px}
details td{overflow-wrap:anywhere;min-width:8em}
details td:first-child{width:16em;color:var(--soft)}
footer{margin:24px 0 0;color:var(--soft);font-size:13px}
@media (max-width:860px){
.wide{display:none}
.narrow{display:block;max-width:560px;margin:0 auto}
.legend{display:flex}
}
@media (max-width:560px){
main{padding:24px 14px 48px}
h1{font-size:25px}
.cards{grid-template-columns:1fr 1fr;gap:8px;margin-top:22px}
.card{padding:12px 13px}
.card:first-child:nth-last-child(odd){grid-column:1/-1}
.card p.big{font-size:23px}
section{padding:18px 16px 20px}
.scroll{margin:0 -16px;padding:0 16px}
details{padding:0 16px}
summary{margin:0 -16px;padding:14px 16px}
details td:first-child{width:auto}
th,td{padding-left:8px;padding-right:8px}
.name{min-width:7.5em}
td.long{min-width:10em}
td .wrap{white-space:normal}
}
@media print{body{background:#fff}section,.card{break-inside:avoid}}
"""


def style_sheet() -> str:
    """All CSS of the page."""
    light = "".join(f".t-{tone}{{--tone:{pair[0]}}}" for tone, pair in PALETTE.items())
    dark = "".join(f".t-{tone}{{--tone:{pair[1]}}}" for tone, pair in PALETTE.items())
    return f"{RULES}{light}\n@media (prefers-color-scheme:dark){{{dark}}}\n"
