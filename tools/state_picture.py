"""The picture of a state machine from its table, as SVG: a line down for each state, an arrow across for each row.

So it needs no layout program, and the same table gives the same bytes on every machine.
"""

from __future__ import annotations

from html import escape

COLUMN, ROW = 170, 34  # pixels between two states, between two arrows
LEFT, TOP = 90, 60
LOOP = 40  # width of an arrow from a state to itself
_STYLE = "font-family:sans-serif;font-size:13px"
_HEAD = '<path d="M0,0 L10,5 L0,10 z" fill="#1f6feb"/>'


def state_picture(table: str, title: str) -> str:
    """An SVG of the rows `state: event: next state` of a table; its states stand in the order of the rows."""
    rows = [row.split(": ") for row in table.strip().splitlines()]
    states = list(dict.fromkeys([row[0] for row in rows] + [row[2] for row in rows]))
    x = {state: LEFT + COLUMN * number for number, state in enumerate(states)}
    width, height = LEFT * 2 + COLUMN * (len(states) - 1) + LOOP, TOP + ROW * (len(rows) + 1)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" style="{_STYLE}">',
        f"<title>{escape(title)}</title>",
        f'<defs><marker id="end" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7"'
        f' orient="auto">{_HEAD}</marker></defs>',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
    ]
    for state in states:
        lines += [
            f'<line x1="{x[state]}" y1="{TOP - 16}" x2="{x[state]}" y2="{height - 10}" stroke="#c0c0c0"/>',
            f'<text x="{x[state]}" y="{TOP - 28}" text-anchor="middle" font-weight="bold">{escape(state)}</text>',
        ]
    for number, (source, event, target) in enumerate(rows):
        lines += _arrow(x[source], x[target], TOP + ROW * number + 22, event)
    return "\n".join([*lines, "</svg>", ""])


def _arrow(start: int, end: int, y: int, event: str) -> list[str]:
    """One row: the arrow, and above it what makes the machine go that way."""
    shape = 'fill="none" stroke="#1f6feb" stroke-width="1.5" marker-end="url(#end)"'
    if start == end:
        way = f"M{start},{y - 6} h{LOOP} v10 h-{LOOP}"
        words = f'<text x="{start + LOOP + 6}" y="{y + 4}">{escape(event)}</text>'
    else:
        way = f"M{start},{y} H{end}"
        middle = (start + end) // 2
        words = f'<text x="{middle}" y="{y - 5}" text-anchor="middle">{escape(event)}</text>'
    return [f'<circle cx="{start}" cy="{y - 6 if start == end else y}" r="3"/>', f'<path d="{way}" {shape}/>', words]
