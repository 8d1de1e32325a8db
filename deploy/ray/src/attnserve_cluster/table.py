"""How a cluster is, for people."""

from typing import Any

_HEAD = ("server", "state", "address", "node", "sessions", "queue ms", "kv", "restarts", "")


def table(status: dict[str, Any]) -> str:
    """A line for the cluster, and one for each of its servers."""
    least, most = status["servers_least"], status["servers_most"]
    wanted = f"{status['servers_wanted']} wanted"
    if least != most:
        wanted += f", of {least}-{most} by load"
    serving = sum(each["state"] == "serving" for each in status["servers"])
    first = f"{status['name']}: {serving} serve, {wanted}; {status['placement']} each"
    if status["ending"]:
        first += "; it is going down"
    if status["trouble"]:
        first += f"; trouble: {status['trouble']}"
    rows = [_HEAD, *map(_row, status["servers"])]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join([first, *lines] if status["servers"] else [first])


def _row(server: dict[str, Any]) -> tuple[str, ...]:
    return (
        str(server["number"]),
        server["state"],
        server["address"] or "-",
        server["node"] or "-",
        _number(server["sessions"], "{}"),
        _number(server["queue_ms"], "{:.1f}"),
        _number(server["kv_share"], "{:.0%}"),
        str(server["restarts"]),
        server["trouble"],
    )


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
