"""Colours of the plots, for light and for dark pages; each series also has its own marker."""

# Told apart with the common colour-vision deficiencies, and at 3:1 or more on their page.
LIGHT = ("#0b63b5", "#c2410c", "#0f766e", "#9333a8", "#7a6200", "#be185d")
DARK = ("#6cb6ff", "#ff9d6b", "#4fd1bd", "#d9a4f0", "#e0c250", "#ff8fbf")
MARKERS = ("o", "s", "^", "D", "v", "P")

INK, MUTED, GRID, PAPER = "#1c2128", "#57606a", "#d8dee4", "#ffffff"
DARK_INK, DARK_MUTED, DARK_GRID, DARK_PAPER = "#e6edf3", "#a3adb8", "#3a424c", "#14181d"


def series_style(index: int) -> tuple[str, str]:
    """The light colour and the marker of a series."""
    return LIGHT[index % len(LIGHT)], MARKERS[index % len(MARKERS)]
