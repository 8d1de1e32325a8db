"""Attention made visible: pages, figures, what notebooks show, and head analysis.

    result -> attention.maps_of -> AttentionMap -> measures -> page, summary, plot

The page is one HTML file that needs nothing else: markup, style and script of `page_assets/`, and
the weights as `encoding` packs them. `context/` measures what heads give to a fact in a growing
context; it needs the extra `attnserve-lens[context]`, as its reports are those of the load test.

The SDK finds `plot`, `save_html` and `attnserve inspect` by this distribution's entry points, and
imports nothing of it before they are used.
"""

from attnserve_lens.attention import AttentionMap, maps_of
from attnserve_lens.page import page_of, write_page
from attnserve_lens.summary import summary_html

__version__ = "0.1.0"

__all__ = ["AttentionMap", "maps_of", "page_of", "summary_html", "write_page"]
