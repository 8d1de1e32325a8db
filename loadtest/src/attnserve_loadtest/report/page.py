"""What the pages of all reports are made of: they need nothing else, light or dark."""

from collections.abc import Sequence
from html import escape

from attnserve_loadtest.report import palette
from attnserve_loadtest.report.schema import Distribution
from attnserve_loadtest.report.terminal import format_ms


def page(title: str, sections: Sequence[str]) -> str:
    """A whole page.

    Args:
        title: as text.
        sections: as HTML.
    """
    title = escape(title)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8"/>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>\n'
        '<meta name="color-scheme" content="light dark"/>\n'
        f"<title>{title}</title>\n<style>{page_style()}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{title}</h1>\n" + "\n".join(sections) + "\n</main>\n</body>\n</html>\n"
    )


def table(head: str, rows: Sequence[str], caption: str) -> str:
    """A table that scrolls by itself where it is too wide."""
    return (
        f'<div class="scroll"><table><caption>{escape(caption)}</caption>'
        f"<thead>{head}</thead><tbody>{''.join(rows)}</tbody></table></div>\n"
    )


def head(columns: Sequence[str]) -> str:
    """The first row of a table."""
    return "<tr>" + "".join(f'<th scope="col">{escape(each)}</th>' for each in columns) + "</tr>"


def row(cells: Sequence[str]) -> str:
    """A row whose first cell names it; cells are HTML."""
    first, *others = cells
    return f'<tr><th scope="row">{first}</th>' + "".join(f"<td>{c}</td>" for c in others) + "</tr>"


def ms(distribution: Distribution | None, statistic: str) -> str:
    """A figure of a distribution in milliseconds, or a dash."""
    return "-" if distribution is None else format_ms(getattr(distribution, statistic))


def page_style() -> str:
    """The style sheet of the reports: light or dark as the reader's system is."""

    def variables(ink: str, muted: str, grid: str, paper: str, series: tuple[str, ...]) -> str:
        colours = {"ink": ink, "muted": muted, "grid": grid, "paper": paper}
        colours |= {f"series-{index}": colour for index, colour in enumerate(series)}
        return "".join(f"--{name}:{colour};" for name, colour in colours.items())

    p = palette
    light = variables(p.INK, p.MUTED, p.GRID, p.PAPER, p.LIGHT)
    dark = variables(p.DARK_INK, p.DARK_MUTED, p.DARK_GRID, p.DARK_PAPER, p.DARK)
    return f":root{{{light}}}@media(prefers-color-scheme:dark){{:root{{{dark}}}}}{_RULES}"


_RULES = """
body{margin:0;background:var(--paper);color:var(--ink);
  font:16px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:76rem;margin:0 auto;padding:1.5rem}p{max-width:62rem}
h1{font-size:1.6rem;line-height:1.25}h2{font-size:1.25rem;margin-top:2.2rem}
h3{font-size:1.05rem}
figure{margin:1.5rem 0;overflow-x:auto}svg{width:100%;height:auto;display:block}
@media(max-width:44rem){main{padding:1rem}figure svg{min-width:40rem}}
.scroll{overflow-x:auto;margin:1rem 0}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
caption{text-align:left;color:var(--muted);padding-bottom:.3rem}
th,td{padding:.3rem .6rem;text-align:right;border-bottom:1px solid var(--grid);white-space:nowrap}
thead th{color:var(--muted);font-weight:600}
th:first-child{text-align:left;padding-left:0}tbody th{font-weight:600}
.key{display:inline-block;width:.75em;height:.75em;border-radius:2px;margin-right:.5em}
.warning{border-left:4px solid var(--series-1);padding-left:.8rem}
summary{cursor:pointer;padding:.3rem 0}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.3rem 1.2rem}
dt{color:var(--muted)}dd{margin:0;overflow-wrap:anywhere}
@media print{details{display:block}}
"""
