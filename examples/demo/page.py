"""One self-contained HTML page: no scripts, no files beside it.

In: what the run measured, as a `Story`. Out: the page's text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

MEAN = 10  # steps that the loss is averaged over
COLOURS = {0: "var(--empty)", 1: "var(--partial)", 2: "var(--full)"}

STYLE = """
:root { --ink: #1d2433; --soft: #667085; --line: #d8dee8; --step: #a9b7cf; --paper: #fff;
  --card: #f6f8fb; --accent: #2f6fde; --empty: #eef1f6; --partial: #f2b544; --full: #2f6fde; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ef; --soft: #98a2b3; --line: #344054;
  --step: #56657d; --paper: #12161f; --card: #1b212d; --accent: #7aa7ff; --empty: #222a38;
  --full: #5b8def; } }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 880px; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; margin: 0 0 .25rem; } h2 { font-size: 1.15rem; margin: 2.5rem 0 .5rem; }
p { margin: .4rem 0; } .soft { color: var(--soft); font-size: .9rem; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: .8rem 1rem; overflow-x: auto; font-size: .85rem; line-height: 1.45; }
.wrap { white-space: pre-wrap; overflow-wrap: anywhere; }
table { border-collapse: collapse; } th, td { padding: .35rem 1.2rem .35rem 0; text-align: left;
  border-bottom: 1px solid var(--line); } td.n, th.n { text-align: right; }
svg { width: 100%; height: auto; } .square { max-width: 420px; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(360px, 1fr)); gap: 1rem; }
text { font: 12px system-ui, sans-serif; fill: var(--soft); }
i { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin: 0 .35em 0 .9em; }
"""


@dataclass(frozen=True)
class Speed:
    """Tokens per second of one way to write the attention, training and forward alone."""

    name: str
    training: float | None
    forward: float | None


@dataclass(frozen=True)
class Story:
    """Everything the page tells. `mask` is a grid of 0 (empty), 1 (partial), 2 (full)."""

    summary: str
    machine: str
    losses: Sequence[float]
    agreement: str
    speeds: Sequence[Speed]
    mask: Sequence[Sequence[int]]
    mask_note: str
    source: str
    graph: str
    gradient: str
    sample: str


def page(story: Story) -> str:
    """The HTML text."""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>flexattn demo</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>
<body>
<h1>A transformer trained with flexattn</h1>
<p>{escape(story.summary)}</p><p class="soft">{escape(story.machine)}</p>
<h2>Loss</h2>
{curve(story.losses)}
<p class="soft"><i style="background:var(--accent)"></i>mean of the last {MEAN} steps
<i style="background:var(--step)"></i>each step</p>
<p>{escape(story.agreement)}</p>
<h2>Speed</h2>
{table(story.speeds)}
<p class="soft">Tokens a second of the same model with the same weights, measured in turns.
SDPA gets ALiBi and the mask as one tensor a layer and leaves the slopes untrained; flexattn trains
them. torch's flex_attention runs without torch.compile and has no backward on a CPU.</p>
<h2>Block mask</h2>
<div class="square">{picture(story.mask)}</div>
<p class="soft"><i style="background:var(--full)"></i>full: no element needs the mask
<i style="background:var(--partial)"></i>partial: evaluated element by element
<i style="background:var(--empty)"></i>empty: never visited</p>
<p>{escape(story.mask_note)}</p>
<h2>The mod and the mask, as written</h2>
<pre>{escape(story.source)}</pre>
<h2>What flexattn makes of the mod</h2>
<div class="columns"><div><p class="soft">its graph</p><pre>{escape(story.graph)}</pre></div>
<div><p class="soft">its gradient, a graph too</p><pre>{escape(story.gradient)}</pre></div></div>
<h2>What the model writes after this training</h2>
<pre class="wrap">{escape(story.sample)}</pre>
</body></html>
"""


def table(speeds: Sequence[Speed]) -> str:
    def cell(value: float | None, first: float | None) -> str:
        if value is None or first is None:
            return '<td class="n">-</td><td class="n"></td>'
        return f'<td class="n">{value:,.0f}</td><td class="n">{value / first:.2f}x</td>'

    rows = "".join(
        f"<tr><td>{escape(s.name)}</td>{cell(s.training, speeds[0].training)}"
        f"{cell(s.forward, speeds[0].forward)}</tr>" for s in speeds)
    return ('<table><tr><th></th><th class="n">training</th><th></th>'
            f'<th class="n">forward</th><th></th></tr>{rows}</table>')


def curve(losses: Sequence[float], width: int = 860, height: int = 260) -> str:
    """The loss of every step, and the mean of the last few."""
    left, bottom = 40, 24
    top = max(losses)
    low = min(losses)

    def points(values: Sequence[float]) -> str:
        step = (width - left - 10) / max(1, len(values) - 1)
        scale = (height - bottom - 14) / max(top - low, 1e-9)
        return " ".join(f"{left + i * step:.1f},{8 + (top - value) * scale:.1f}"
                        for i, value in enumerate(values))

    ticks = [(low + (top - low) * i / 4) for i in range(5)]
    lines = "".join(
        f'<line x1="{left}" x2="{width - 10}" y1="{y:.1f}" y2="{y:.1f}" stroke="var(--line)"/>'
        f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:.1f}</text>'
        for tick, y in ((t, 8 + (top - t) * (height - bottom - 14) / max(top - low, 1e-9))
                        for t in ticks))
    return (f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="loss by step">{lines}'
            f'<polyline points="{points(losses)}" fill="none" stroke="var(--step)"/>'
            f'<polyline points="{points(_running_mean(losses))}" fill="none" '
            'stroke="var(--accent)" stroke-width="2"/>'
            f'<text x="{width - 10}" y="{height - 4}" text-anchor="end">step {len(losses)}</text>'
            f'<text x="{left}" y="{height - 4}">nats a byte</text></svg>')


def _running_mean(values: Sequence[float]) -> list[float]:
    windows = (values[max(0, end - MEAN):end] for end in range(1, len(values) + 1))
    return [sum(window) / len(window) for window in windows]


def picture(mask: Sequence[Sequence[int]]) -> str:
    """Rows are queries from the top, columns keys from the left."""
    cells = "".join(
        f'<rect x="{x}" y="{y}" width=".92" height=".92" fill="{COLOURS[kind]}"/>'
        for y, row in enumerate(mask) for x, kind in enumerate(row))
    return (f'<svg viewBox="0 0 {len(mask[0])} {len(mask)}" role="img" '
            f'aria-label="block mask of one sequence">{cells}</svg>')
