"""Attention made visible: the page of `attnserve inspect`, and what notebooks show.

    result -> attention.maps_of -> AttentionMap -> measures, page, summary, and `_plot`

The page is one HTML file that needs nothing else: markup, style and script of `page/`, and the
weights as `encoding` packs them.
"""

from attnserve_client._inspect.attention import AttentionMap, maps_of
from attnserve_client._inspect.page import page_of, write_page
from attnserve_client._inspect.summary import summary_html

__all__ = ["AttentionMap", "maps_of", "page_of", "summary_html", "write_page"]
