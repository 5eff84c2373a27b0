"""What the page shows as HTML: pictures as they grow, rankings, and layers. Every text in it is escaped."""

from base64 import b64encode
from collections.abc import Sequence
from html import escape
from io import BytesIO

from PIL import Image

from demo.ask import Ranking
from demo.layers import Curve, Lens
from demo.paint import Growing, Painted


def data_url(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{b64encode(content).decode()}"


def encode_preview(picture: Image.Image) -> str:
    content = BytesIO()
    picture.save(content, "WEBP", quality=80)
    return data_url(content.getvalue(), "webp")


def encode_png(picture: Image.Image) -> bytes:
    content = BytesIO()
    picture.save(content, "PNG")
    return content.getvalue()


def status(text: str) -> str:
    return f'<p class="status" role="status">{escape(text)}</p>'


WHERE = (
    '<p class="caption"><b>Where DoLa acted</b> on the right one, token by token: JSD(q<sub>N</sub>, p̂) from 0 '
    '<i class="jsd"></i> to the most of this run; <i class="redrawn"></i>another token than the baseline would draw</p>'
)
EMPTY = '<div class="nothing"><p>Pictures appear here while they are painted.</p></div>'


# --- pictures --------------------------------------------------------------------------------------------------------


def column(label: str, drawn: float, cells: Sequence[str]) -> str:
    done = f"{100 * drawn:.0f}"
    return (
        f'<section class="column" aria-label="{escape(label)}"><h3>{escape(label)}</h3>'
        f'<div class="bar" role="progressbar" aria-label="{escape(label)}" aria-valuenow="{done}" aria-valuemin="0" '
        f'aria-valuemax="100"><i style="width:{done}%"></i></div><div class="cells">{"".join(cells)}</div></section>'
    )


def columns(parts: Sequence[str]) -> str:
    return f'<div class="columns n{len(parts)}">{"".join(parts)}</div>'


def picture_cell(source: str, alt: str, note: str = "", best: bool = False) -> str:
    under = f"<figcaption>{note}</figcaption>" if note else ""
    badge = "<b>best</b>" if best else ""
    return f'<figure{" class=best" * best}>{badge}<img src="{source}" alt="{escape(alt)}">{under}</figure>'


class Growth:
    """The columns of pictures while they are painted: those that are whole stay as they were shown last."""

    def __init__(self, images: int):
        self.empty = ['<figure><div class="blank"></div></figure>'] * images
        self.cells: dict[int, list[str]] = {}

    def show(self, growing: Growing) -> str:
        for before in range(growing.variant):
            self.cells.setdefault(before, self.empty)
        self.cells[growing.variant] = [
            picture_cell(encode_preview(picture), f"{growing.labels[growing.variant]}, picture {i}, being painted")
            for i, picture in enumerate(growing.pictures, start=1)
        ]
        drawn = [1.0] * growing.variant + [growing.drawn] + [0.0] * len(growing.labels)
        parts = [column(label, drawn[i], self.cells.get(i, self.empty)) for i, label in enumerate(growing.labels)]
        return columns(parts)


def show_painted(painted: Painted) -> str:
    parts = []
    for label, pictures in zip(painted.labels, painted.pictures, strict=True):
        cells = []
        for picture in pictures:
            source = data_url(picture.file.read_bytes(), "png")
            score = "" if picture.score is None else f"<span>{picture.score:.3g}</span>"
            name = f"{picture.file.parent.name}_{picture.file.name}" if len(painted.labels) > 1 else picture.file.name
            save = f'<a href="{source}" download="{escape(name)}" aria-label="PNG of {escape(picture.name)}">PNG</a>'
            alt = f"{painted.prompt} ({picture.name})"
            cells.append(picture_cell(source, alt, score + save, picture.best))
        parts.append(column(label, 1.0, cells))
    return columns(parts)


# --- answers ---------------------------------------------------------------------------------------------------------


def show_ranking(ranking: Ranking, lambda_mm: float) -> str:
    def meter(p: float) -> str:
        return f'<td class="meter"><i style="width:{100 * p:.1f}%"></i><span>{100 * p:.1f}%</span></td>'

    rows = "".join(
        f"<tr><th scope=row>{escape(candidate)}</th>{meter(base)}{meter(dola)}</tr>"
        for candidate, base, dola in ranking.rows
    )
    return (
        f'<p class="caption"><b>What the vision tower sees.</b> The answer with its ranking fused into DoLa, λ '
        f"{lambda_mm:g}: <b>{escape(ranking.fused)}</b></p>"
        f'<div class="scroll"><table class="ranking"><thead><tr><th scope=col>candidate</th>'
        f"<th scope=col>tower</th><th scope=col>tower with DoLa, layer {ranking.layer}</th></tr></thead>"
        f"<tbody>{rows}</tbody></table></div>"
    )


# --- layers ----------------------------------------------------------------------------------------------------------


WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 340, 60, 112, 16, 44
SHADES = ("#8fd3ca", "#4fb8ab", "#2a9d8f", "#2f7fa0", "#5a67c7")


def show_curve(curve: Curve) -> str:
    """Lines of layers by alpha, the mask alone behind the last one, the baseline across; then the best in figures."""
    lines, layers = curve.dola, len(next(iter(curve.dola.values())))
    values = [curve.baseline, *curve.apc_only.values(), *(p for row in lines.values() for p in row)]
    high = max(values)
    low = min(*values, high - 0.02)

    def x(layer: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (layer - 1) / layers

    def y(p: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (p - low) / (high - low)

    parts = []
    for p in (low + (high - low) * i / 4 for i in range(5)):
        parts.append(f'<path class="grid" d="M{LEFT} {y(p):.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y(p) + 5:.1f}" text-anchor="end">{100 * p:.1f}</text>')
    step = -(-layers // 12)
    ticks = [*((layer, f"{layer}") for layer in range(1, layers + 1, step)), (layers + 1, "APC")]
    parts += [f'<text x="{x(at):.1f}" y="{HEIGHT - 22}" text-anchor="middle">{name}</text>' for at, name in ticks]
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 3}" text-anchor="middle">contrast layer; APC: the mask alone</text>')
    parts.append(f'<path class="baseline" d="M{LEFT} {y(curve.baseline):.1f}H{WIDTH - RIGHT}"/>')
    names = [("baseline", "var(--baseline)")]
    for (alpha, row), shade in zip(lines.items(), SHADES, strict=True):
        points = [(x(layer), y(p), f"layer {layer}", p) for layer, p in enumerate(row, start=1)]
        parts.append(f'<polyline stroke="{shade}" points="{" ".join(f"{a:.1f},{b:.1f}" for a, b, *_ in points)}"/>')
        points.append((x(layers + 1), y(curve.apc_only[alpha]), "APC only", curve.apc_only[alpha]))
        for a, b, at, p in points:
            told = f"{at}, α {alpha}: {100 * p:.2f}%"
            parts.append(f'<circle cx="{a:.1f}" cy="{b:.1f}" r="4" fill="{shade}"><title>{told}</title></circle>')
        names.append((f"α {alpha}", shade))
    for i, (name, shade) in enumerate(names):
        top, left = TOP + 8 + 22 * i, WIDTH - RIGHT + 18
        parts.append(f'<path stroke="{shade}" stroke-width="3" d="M{left} {top}h12"/>')
        parts.append(f'<text x="{left + 17}" y="{top + 5}">{name}</text>')
    p, alpha, layer = max((p, alpha, layer) for alpha, row in lines.items() for layer, p in enumerate(row, 1))
    masked, mask = max((p, alpha) for alpha, p in curve.apc_only.items())
    facts = {
        "baseline": curve.baseline,
        f"APC only, α {mask}": masked,
        f"best: layer {layer}, α {alpha}": p,
    }
    cells = "".join(f"<div><dt>{escape(name)}</dt><dd>{100 * value:.2f}%</dd></div>" for name, value in facts.items())
    return (
        '<p class="caption"><b>Mean probability of the true tokens</b> by contrast layer and α, in %, of this one '
        f'example</p><svg class="curve" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="Mean probability of the '
        f'true tokens by contrast layer and alpha">{"".join(parts)}</svg><dl class="facts">{cells}</dl>'
    )


def show_lens(lens: Lens) -> str:
    """The table of layers, the last one first; for a painting beside the picture with the place in it framed."""
    urls = {code: data_url(encode_png(swatch), "png") for code, swatch in (lens.swatches or {}).items()}

    def token(number: int, name: str) -> str:
        if number in urls:
            return f'<img class="swatch" src="{urls[number]}" alt="code {number}" title="code {number}">'
        return f"<code>{escape(name.strip() or repr(name))}</code>"

    def cell(number: int, name: str, p: float) -> str:
        kind = " class=true" if number == lens.true else ""
        shade = f"--p:{100 * p:.1f}%"
        return f'<td{kind} style="{shade}"><div>{token(number, name)}<span>{100 * p:.1f}%</span></div></td>'

    rows = [
        f"<tr><th scope=row>{layer}</th>{''.join(cell(*entry) for entry in row)}</tr>"
        for layer, row in reversed(list(enumerate(lens.rows, start=1)))
    ]
    heads = "".join(f"<th scope=col>{rank}</th>" for rank in range(1, len(lens.rows[0]) + 1))
    table = (
        f'<div><p class="caption"><b>The most probable tokens of each layer</b> at token {lens.place} of '
        f"{lens.places}; the true one, {token(lens.true, lens.name)}, is framed</p>"
        f'<div class="scroll"><table class="lens">'
        f"<thead><tr><th scope=col>layer</th>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table></div></div>"
    )
    if lens.picture is None:
        return table
    side = round(lens.places**0.5)
    y, x = divmod(lens.place - 1, side)
    box = f"left:{100 * x / side}%;top:{100 * y / side}%;width:{100 / side}%"
    seen = data_url(encode_png(lens.picture), "png")
    return (
        f'<div class="place"><div><img src="{seen}" alt="the picture as its codes have it">'
        f'<i style="{box};height:{100 / side}%"></i></div>{table}</div>'
    )
