"""matplotlib figures as SVG to place in a page: themed by the page, without any outside address."""

import io
import re
from html import escape

import matplotlib
from matplotlib.figure import Figure

from attnserve_loadtest.report import palette

# Text stays text, and the same figure gives the same bytes.
_STYLE = {"svg.fonttype": "none", "svg.hashsalt": "attnserve"}

# The figure's light colours, as the page's style sheet names them.
_VARIABLES = {
    palette.INK: "--ink",
    palette.MUTED: "--muted",
    palette.GRID: "--grid",
    palette.PAPER: "--paper",
    **{colour: f"--series-{index}" for index, colour in enumerate(palette.LIGHT)},
}


def inline_svg(figure: Figure, *, name: str, title: str, description: str) -> str:
    """The figure as an `<svg>` element.

    Args:
        figure: drawn with the palette's light colours.
        name: makes the element's ids its own; letters and hyphens.
        title: what it is, for those who cannot see it.
        description: what it shows, likewise.
    """
    out = io.StringIO()
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context(_STYLE):  # type: ignore[arg-type]
        figure.savefig(out, format="svg", transparent=True, metadata=no_metadata)
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg)
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", svg)
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)
    for colour, variable in _VARIABLES.items():
        svg = re.sub(re.escape(colour), f"var({variable})", svg, flags=re.IGNORECASE)
    labelled = f'role="img" aria-labelledby="{name}-title {name}-description"'
    texts = (
        f'<title id="{name}-title">{escape(title)}</title>'
        f'<desc id="{name}-description">{escape(description)}</desc>'
    )
    opening, rest = svg.split(">", 1)
    opening = re.sub(r' (width|height)="[^"]*"', "", opening)
    return f"{opening} {labelled}>{texts}{rest}"
