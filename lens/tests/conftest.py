"""The browser of the tests of pages."""

from chromium import browser

__all__ = ["browser"]
