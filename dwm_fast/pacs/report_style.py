"""The report's fixed words, and its style sheet: light and dark, for paper and for a narrow screen."""

VIEWS = {
    "shared": "View “shared” (the paper's): one network, fine-tuned on the target, serves both domains",
    "masked": "View “masked”: the source under its own bits, with its own batch norm and head",
}
NATURE = {
    True: "Real images.",
    False: "Images drawn by a program: four rendering styles of seven shapes. They stand in for "
    "PACS where it is not at hand, and are not PACS.",
}
CAPTIONS = {
    "accuracy": "Accuracy after fine-tuning, per pair. Filled: on the source; open: on the target.",
    "retention": "What is kept on the source against what is reached on the target. Dotted lines cross at "
    "plain fine-tuning (star): a mask above the star forgets less, one left of it learns less.",
    "sparsity": "Fraction of each layer's weights that the mask keeps, frozen while the target is learned.",
    "overlap": "How far the masks of two domains keep the same weights (Jaccard index), and below it what "
    "two unrelated masks of the same density per layer would share.",
    "training": "Accuracy per epoch of every run.",
}
DEFINITIONS = (
    ("source, target", "A network is trained on the source domain, then fine-tuned on the target domain."),
    ("keep", "A kept weight stays frozen while the target is learned; the others are reused."),
    ("init", "Where reused weights start: S_start before source training, S_end after it, random afresh."),
    ("none", "Plain fine-tuning of every weight: the baseline of both differences."),
    (
        "S gain",
        "Source accuracy after fine-tuning, minus the baseline's of the same pair and seed.",
    ),
    ("T drop", "Target accuracy after fine-tuning, minus the baseline's. Negative: below plain fine-tuning."),
    ("view shared", "The paper's view: one network, as fine-tuning left it, is tested on both domains."),
    (
        "view masked",
        "The source is tested under its own keep mask: reused weights are zeroed, batch norm and head are "
        "its own. Nothing done for the target can change it.",
    ),
    ("batch norm", "Frozen: as the source left it. Shared: trained on the target. Per-domain: each its own."),
)

CSS = """
:root { color-scheme: light dark; --ink: #1f2328; --soft: #5c636b; --line: #d9dde2; --ground: #ffffff;
  --panel: #f5f7f9; --accent: #0072b2; --warn: #8a4b00; --warnground: #fff1dc; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7ea; --soft: #a0a8b0; --line: #3a4047;
  --ground: #16191d; --panel: #1f2429; --accent: #5bb3e6; --warn: #ffc778; --warnground: #3b2a10; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 80rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.8rem; line-height: 1.2; margin: 0 0 .5rem; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .75rem; padding-bottom: .3rem;
  border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.25rem 0 .5rem; }
p, ul { max-width: 46rem; }
header p { color: var(--soft); margin: 0; max-width: none; }
ul { padding-left: 1.25rem; }
li { margin: .25rem 0; }
.badge { display: inline-block; padding: .1rem .6rem; margin-right: .5rem; border-radius: 1rem;
  font-weight: 600; background: var(--panel); color: var(--ink); border: 1px solid var(--line); }
.badge.standin { background: var(--warnground); color: var(--warn); border-color: currentColor; }
.lead { font-size: 1.2rem; line-height: 1.45; border-left: 4px solid var(--accent); padding-left: 1rem; }
.note, figcaption, caption { color: var(--soft); font-size: .9rem; }
.wide { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
caption { text-align: left; padding: .25rem 0 .5rem; font-weight: 600; }
th, td { padding: .35rem .65rem; text-align: right; vertical-align: top; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
thead th { background: var(--panel); font-weight: 600; }
th:first-child { text-align: left; font-weight: 500; }
td span, td strong { display: inline-block; }
td small, th small { display: block; color: var(--soft); font-weight: 400; font-size: .82rem; }
.drop { font-size: .88rem; }
td span.spread, td small .spread { color: var(--soft); font-weight: 400; font-size: .85em; }
.swatch { display: inline-block; width: .7em; height: .7em; border-radius: 50%; margin-right: .5em; }
figure { margin: 1.5rem 0 2.25rem; }
figure img { display: block; max-width: 100%; height: auto; margin: 0 auto; background: #ffffff;
  border: 1px solid var(--line); border-radius: 8px; padding: .5rem; }
figcaption { margin-top: .5rem; max-width: 46rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .3rem 1.25rem; margin: .5rem 0; }
dt { font-weight: 600; }
dd { margin: 0; overflow-wrap: anywhere; }
.settings { font-size: .88rem; font-family: ui-monospace, "DejaVu Sans Mono", monospace; }
.settings dt { font-weight: 400; color: var(--soft); }
pre { background: var(--panel); border: 1px solid var(--line); border-radius: 8px; padding: .75rem 1rem;
  overflow-x: auto; }
summary { cursor: pointer; margin-top: 1rem; }
@media (max-width: 40rem) { dl { grid-template-columns: 1fr; } dd { margin-bottom: .5rem; } }
@media print { main { max-width: none; padding: 0; } figure, tr { break-inside: avoid; } }
"""
