"""The scaling report: what it holds, and how it is written as JSON, CSV, PNG, HTML and text."""
