"""Formats the results of ``gpu.py`` as Markdown and as a picture."""

from typing import Any

from benchmarks.lib import result_files

GIB = 2**30
HEADER = ["", "measurement", "s per step", "planned", "tokens/s", "peak GiB", "planned", "at most", "the paper's",
          "share", "remarks"]  # fmt: skip
LEGEND = (
    "Peaks are those of torch's allocator. Planned figures are predictions of lomo_ds.planner. Predicted seconds "
    "assume that matrix products reach 0.6 of the peak that the GPU's maker states, and the measured link. There are "
    "no predictions for methods other than those of lomo_ds and DeepSpeed, or for an update alone. The collectives of "
    "a simulated rank communicate nothing, so its times are not reported.\n"
)


def describe(rows: list[dict[str, Any]]) -> str:
    """Format a table of all rows, the ratios between methods, and the failures."""
    lines = [line for row in rows for line in lines_of(row)]
    text = f"# On one GPU\n\n{result_files.table(HEADER, lines)}\n{LEGEND}"
    ratios = [(row["place"], part) for row in rows for part in row["parts"] if "ratio" in part]
    if ratios:
        header = ["", "step time, lomo_ds / other", "median", "lowest", "highest", "at most", ""]
        text += f"\n{result_files.table(header, [_ratio(place, part) for place, part in ratios])}"
    for row in rows:
        if "link" in row:
            link = row["link"]
            text += (
                f"\nRow {row['place']}, the link: {link['up'] / 1e9:.1f} GB/s up, {link['down'] / 1e9:.1f} down, "
                f"{link['each of both'] / 1e9:.1f} in each direction when both are busy.\n"
            )
        if row.get("error"):
            text += f"\nRow {row['place']} {row['outcome']}: `{row['error']}`\n"
    return text


def lines_of(row: dict[str, Any]) -> list[list[str]]:
    """Return a table row for each part, and one for a row that has no parts or was not fully measured."""
    lines = [[row["place"], *cells(part)] for part in row["parts"] if "ratio" not in part]
    if not lines or row["outcome"] != "measured":
        lines.append([row["place"], row["title"], *[""] * 8, f"**{row['outcome']}**"])
    return lines


def cells(part: dict[str, Any]) -> list[str]:
    """Return the table cells of a part after the first cell."""
    share = f"{part['share']:.0%} of {part['share_of']}" if "share" in part else ""
    remarks = [*part.get("remarks", ()), *([part["not_followed"]] if "not_followed" in part else [])]
    if part.get("outcome", "measured") != "measured":
        remarks.append((part["outcome"].strip().splitlines() or [""])[-1])
    return [
        part["name"],
        _seconds(part.get("step_seconds")),
        _seconds(part.get("planned_seconds")),
        f"**{part['tokens_per_second']:.4g}**" if "tokens_per_second" in part else "",
        f"**{part['peak'] / GIB:.2f}**" if part.get("peak") else "",
        f"{part['planned_peak'] / GIB:.2f}" if part.get("planned_peak") else "",
        f"{part['at_most']:.2f}" if part.get("at_most") else "",
        f"{part['papers']:.2f}" if part.get("papers") else "",
        share,
        "; ".join(f"**{remark}**" for remark in remarks),
    ]


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _ratio(place: str, part: dict[str, Any]) -> list[str]:
    ratio = part["ratio"]
    goal = "" if ratio["goal"] is None else f"{ratio['goal']:.2f}"
    verdict = "" if ratio["met"] is None else "met" if ratio["met"] else "**missed**"
    figures = [f"**{ratio['median']:.2f}**", f"{ratio['lowest']:.2f}", f"{ratio['highest']:.2f}"]
    return [place, part["name"], *figures, goal, verdict]


def draw(rows: list[dict[str, Any]]) -> Any:
    """Draw the measured peaks as bars, with marks at the planned ones; None if there are no peaks."""
    parts = [part for row in rows for part in row["parts"] if part.get("peak") and part.get("planned_peak")]
    if not parts:
        return None
    figure, axes = result_files.pyplot().subplots(figsize=(10, 1.2 + 0.4 * len(parts)), layout="constrained")
    places = list(range(len(parts), 0, -1))
    axes.barh(places, [part["peak"] / GIB for part in parts], 0.7, color="#1b7f79", label="measured")
    axes.plot(
        [part["planned_peak"] / GIB for part in parts], places, "|", color="#222222", markersize=14, label="planned"
    )
    axes.set_yticks(places, [part["name"] for part in parts], fontsize=8)
    axes.set_xlabel("GiB at the peak of a step")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure
