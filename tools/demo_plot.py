"""Draw the training curve as a small SVG, without a plotting library."""

from __future__ import annotations

from typing import Any

WIDTH, HEIGHT = 640, 320
LEFT, RIGHT, TOP, BOTTOM = 56, 60, 24, 44


def curve(history: list[dict[str, Any]], unigram_loss: float, peak: float) -> str:
    """Held-out span loss and learning rate over the steps, with the unigram baseline as a dashed line."""
    last = float(history[-1]["step"])
    measured = [float(entry["span_loss"]) for entry in history]
    low = int(min(measured) * 2) / 2
    high = max(unigram_loss, *measured) + 0.2

    def x(step: float) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * step / last, 1)

    def y(loss: float) -> float:
        return round(TOP + (HEIGHT - TOP - BOTTOM) * (high - loss) / (high - low), 1)

    def y_rate(rate: float) -> float:
        return y(low + (high - low) * rate / peak * 0.95)

    floor = HEIGHT - BOTTOM
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="sans-serif" font-size="12" role="img" aria-label="Held-out span loss over training steps">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
    ]
    ticks = low
    while ticks <= high:
        parts.append(f'<path d="M{LEFT} {y(ticks)}H{WIDTH - RIGHT}" stroke="#e3e3e3"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y(ticks) + 4}" text-anchor="end" fill="#444">{ticks:.1f}</text>')
        ticks += 0.5
    for share in range(5):
        step = last * share / 4
        anchor = f'x="{x(step)}" y="{floor + 18}" text-anchor="middle" fill="#444"'
        parts.append(f"<text {anchor}>{step:.0f}</text>")
    rates = " ".join(f"{x(e['step'])},{y_rate(e['rate'])}" for e in history)
    losses = " ".join(f"{x(e['step'])},{y(e['span_loss'])}" for e in history)
    parts += [
        f'<polyline points="{rates}" fill="none" stroke="#e08214" stroke-width="1.5" stroke-dasharray="2 3"/>',
        f'<path d="M{LEFT} {y(unigram_loss)}H{WIDTH - RIGHT}" stroke="#777" stroke-dasharray="6 4"/>',
        f'<text x="{WIDTH - RIGHT - 6}" y="{y(unigram_loss) - 5}" text-anchor="end" fill="#555">'
        f"unigram baseline {unigram_loss:.2f}</text>",
        f'<polyline points="{losses}" fill="none" stroke="#2166ac" stroke-width="2"/>',
        f'<text x="{x(last) + 5}" y="{y(history[-1]["span_loss"]) + 4}" fill="#2166ac">'
        f"{history[-1]['span_loss']:.2f}</text>",
        f'<text x="{x(last / 2)}" y="{HEIGHT - 8}" text-anchor="middle" fill="#222">training step</text>',
        f'<text x="{LEFT}" y="{TOP - 9}" fill="#2166ac">held-out span loss (nats a token)</text>',
        f'<text x="{WIDTH - RIGHT}" y="{TOP - 9}" text-anchor="end" fill="#b35806">learning rate, peak {peak:g}</text>',
        "</svg>",
    ]
    return "\n".join(parts) + "\n"
