"""Writes docs/method.svg from plain shapes, placed by hand (Hopper's sizes, H = 7): python docs/make_method_svg.py"""

import math
import random
import re
from pathlib import Path

WIDTH, HEIGHT = 900, 790
INK, GREY, PALE, REAL, MADE, INFERRED = "#1c2733", "#5b6876", "#d9dee4", "#1f6fb4", "#ee9a2e", "#23946b"
shapes = [
    f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="Helvetica, sans-serif">',
    '<marker id="arrow" refX="5" refY="3" overflow="visible" orient="auto"><path d="M0 0L6 3L0 6z"/></marker>',
]


def text(x, y, words, size=13, fill=INK, anchor="start", weight="normal"):
    """Words from, or around, a point; s_{t} has its index below the line."""
    lowered = rf'<tspan dy="3" font-size="{size - 3}">\1</tspan><tspan dy="-3">\2</tspan>'
    words = re.sub(r"_\{(.*?)\}([^_]*)", lowered, words).replace('<tspan dy="-3"></tspan>', "")
    style = f'font-size="{size}" fill="{fill}" text-anchor="{anchor}" font-weight="{weight}"'
    shapes.append(f'<text x="{x:g}" y="{y:g}" {style}>{words}</text>')


def rect(x, y, width, height, fill, style=""):
    shapes.append(f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{fill}" {style}/>')


def mark(kind, x, y, fill, size):
    """A state is a circle, an action a square, a reward a square on its corner."""
    style = {"state": f'rx="{size / 2:g}"', "action": "", "reward": f'transform="rotate(45 {x:g} {y:g})"'}[kind]
    rect(x - size / 2, y - size / 2, size, size, fill, style)


def line(*points, stroke=INK, end='marker-end="url(#arrow)"'):
    path = "M" + " L".join(f"{x:g} {y:g}" for x, y in points)
    shapes.append(f'<path d="{path}" fill="none" stroke="{stroke}" stroke-width="1.6" {end}/>')


def section(x, y, number, title, *functions):
    """Number of a section of the scripts, its title and the functions that are drawn beside it."""
    rect(x, y, 24, 24, INK, 'rx="5"')
    text(x + 12, y + 17, number, 14, "#ffffff", "middle", "bold")
    text(x + 32, y + 17, title, 14, weight="bold")
    for i, name in enumerate(functions):
        text(x, y + 42 + 17 * i, name, 12, GREY)


rect(0, 0, WIDTH, HEIGHT, "#f6f8fa", 'rx="10"')
for top, bottom in ((40, 136), (146, 330), (340, 554), (564, 716), (726, 780)):
    rect(10, top, WIDTH - 20, bottom - top, "#ffffff", f'rx="8" stroke="{PALE}"')
    if top > 40:
        line((100, top - 9), (100, top + 3))
for x, fill, words in ((20, REAL, "real"), (82, MADE, "generated"), (185, INFERRED, "inferred")):
    rect(x, 15, 14, 14, fill, 'rx="3"')
    text(x + 20, 27, words)
for x, kind, size in ((656, "state", 14), (728, "action", 14), (806, "reward", 11)):
    mark(kind, x, 22, GREY, size)
    text(x + 14, 27, kind)
section(20, 52, "2", "Data", "Windows")
text(294, 64, "real pair s_{t}, a_{t}", anchor="middle")
line((190, 86), (850, 86), stroke=PALE, end="")
for i in range(21):
    mark("state", 190 + 33 * i, 86, *((REAL, 26) if i == 3 else (PALE, 14)))
mark("action", 318, 86, REAL, 18)
line((289, 106), (289, 120), (850, 120), (850, 106), stroke=REAL, end="")
text(570, 113, "return-to-go: discounted rewards to the episode's end", 13, REAL, "middle")
section(20, 158, "3", "World model", "TemporalUNet", "sample_rollouts")
random.seed(3)
for grid, (kept, name) in enumerate(((0.01, "x_{5}, noise"), (0.58, "x_{3}"), (0.95, "x_{1}"), (1, "x_{0}"))):
    left = 200 + 176 * grid
    text(left + 58, 168, name, anchor="middle")
    for step in range(8):
        for row in range(12):
            clean = 0.5 + 0.45 * math.sin(0.55 * step + 1.9 * row)
            shade = kept * clean + math.sqrt(1 - kept**2) * random.uniform(-0.3, 1.3)
            shade = f'fill-opacity="{min(max(shade, 0.06), 1):.2f}"'
            rect(left + 13 * step, 176 + 8 * row + 3 * (row == 11), 12, 7, MADE, shade)
    if grid:
        line((left - 53, 228), (left - 8, 228))
        text(left - 30, 220, f"k = {7 - 2 * grid}", 12, anchor="middle")
text(200, 296, "window [B, 8, 12]: for each of H+1 steps the change of 11 state dimensions and, below them, 1 reward")
text(200, 316, "each arrow: the denoiser, told k, pair and return-to-go; K = 5 levels of noise, 3 of them visited")
section(20, 352, "5", "Synthesis", "imagine")
section(20, 468, "4", "Inverse dynamics", "infer_actions")
text(200, 364, "imagined: states [B, 9, 11], the first one real, and rewards [B, 8]")
line((215, 416), (845, 416), stroke=PALE, end="")
for i in range(9):
    x, index = 215 + 78.75 * i, f"t+{i}" if i else "t"
    mark("state", x, 416, MADE if i else REAL, 26)
    text(x, 394, f"s_{{{index}}}", 13, anchor="middle")
    if i < 8:
        mark("reward", x + 39, 416, MADE, 12)
        mark("action", x + 39, 480, INFERRED if i else REAL, 18)
        text(x + 39, 509, f"a_{{{index}}}", 13, anchor="middle")
for start, end in ((294, 403), (372, 411), (451, 419)):
    line((start, 432), (end, 465), stroke=INFERRED)
text(450, 457, "from three states the action that leads from the second to the third", 12, INFERRED)
text(200, 539, "triples [B, 7, 33] become actions [B, 7, 3]; the first action of all is the real one")
section(20, 576, "5", "Synthesis", "mark_ends", "complete_rollouts")
left = 200
for name, width in (("obs 11", 200), ("action 3", 72), ("reward 1", 72), ("next_obs 11", 200), ("terminated 1", 110)):
    text(left + width / 2, 594, name, 12, anchor="middle")
    for h in range(8):
        fill = {"action 3": INFERRED, "terminated 1": GREY if h == 5 else PALE}.get(name, MADE)
        fill = REAL if h == 0 and name in ("obs 11", "action 3") else fill
        rect(left, 602 + 11 * h, width - 4, 9, fill, 'fill-opacity="0.22"' if h > 5 else "")
    left += width
text(200, 707, "H+1 = 8 rows of 27 numbers from each real pair, but none after a fall (not in the paper)")
section(20, 741, "6", "Agent")
section(430, 741, "7", "main")
for x, width, words in ((200, 150, "TD3+BC or IQL"), (590, 110, "simulator")):
    rect(x, 736, width, 34, "#eef1f4", f'rx="6" stroke="{PALE}"')
    text(x + width / 2, 758, words, 13, INK, "middle", "bold")
line((350, 753), (420, 753))
line((520, 753), (582, 753))
text(382, 746, "actor", 12, anchor="middle")
text(714, 757, "needs neither model", 13, GREY)
Path(__file__).with_name("method.svg").write_text("\n".join([*shapes, "</svg>\n"]))
