"""Adds the server's own timings to Locust's web UI: a tab, a CSV file, and JSON.

The tab `Server timings` is a table that Locust's page draws itself; `/attnserve/timings.csv` and
`/attnserve/timings.json` give the same rows.
"""

import csv
import io
import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from flask import Response, jsonify, request

from attnserve_loadtest.collector import RowMeans, TimingsCollector

_TAB = "server-timings"
_COLUMNS = {
    "method": "Method",
    "name": "Name",
    "answers": "# Answers",
    "end_to_end_ms": "End to end (ms)",
    "deserialize_ms": "Deserialize (ms)",
    "queue_ms": "Queue (ms)",
    "compute_ms": "Compute (ms)",
    "serialize_ms": "Serialize (ms)",
    "wire_ms": "Wire (ms)",
    "batch_size": "Batch size",
}


def install(
    environment: Any,
    timings: TimingsCollector,
    choose_users: Callable[[Any, str, str], None],
) -> None:
    """Extend the web UI of a Locust environment.

    Args:
        environment: Locust's, with a web UI.
        timings: what to show.
        choose_users: called with the environment and the two models of the form, before a start.
    """
    app = environment.web_ui.app
    arguments = environment.web_ui.template_args
    arguments["extended_tabs"] = [{"title": "Server timings", "key": _TAB}]
    arguments["extended_tables"] = [
        {
            "key": _TAB,
            "structure": [{"key": key, "title": title} for key, title in _COLUMNS.items()],
        }
    ]
    arguments["extended_csv_files"] = [
        {"href": "/attnserve/timings.csv", "title": "Download server timings CSV"}
    ]

    @app.route("/attnserve/timings.json")  # type: ignore[untyped-decorator]
    def timings_json() -> Response:
        return jsonify([asdict(row) for row in timings.rows()])

    @app.route("/attnserve/timings.csv")  # type: ignore[untyped-decorator]
    def timings_csv() -> Response:
        return Response(
            _csv(timings.rows()),
            mimetype="text/csv",
            headers={"Content-Disposition": "attachment;filename=server_timings.csv"},
        )

    @app.before_request  # type: ignore[untyped-decorator]
    def before_swarm() -> None:
        options = environment.parsed_options
        if request.path.endswith("/swarm") and not getattr(options, "class_picker", False):
            choose_users(
                environment,
                request.form.get("model", options.model),
                request.form.get("tokens_model", options.tokens_model),
            )

    @app.after_request  # type: ignore[untyped-decorator]
    def add_to_statistics(response: Response) -> Response:
        if request.path.endswith("/stats/requests") and response.is_json:
            rows = [_rounded(row) for row in timings.rows()]
            answer = response.get_json() | {"extended_stats": [{"key": _TAB, "data": rows}]}
            response.set_data(json.dumps(answer))
        return response


def _rounded(row: RowMeans) -> dict[str, Any]:
    return {
        key: round(value, 3) if isinstance(value, float) else value
        for key, value in asdict(row).items()
    }


def _csv(rows: list[RowMeans]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=list(_COLUMNS))
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    return out.getvalue()
