"""Draws what the benches have written: for each JSON file an SVG beside it, with a row for each figure that several subjects have. A bar is the
median of a subject, a line on it the lowest and the highest, and the longest of a row is 1."""

import json
import statistics
import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot

BAR_INCHES, WIDTH_INCHES = 0.18, 10
# Between the rows, in bars.
GAP = 1


def rows(samples):
    """Name and values by subject."""
    for figure in dict.fromkeys(figure for runs in samples.values() for run in runs for figure in run):
        values = {subject: [run[figure] for run in runs if figure in run] for subject, runs in samples.items()}
        values = {subject: found for subject, found in values.items() if found}
        if len(values) > 1 and max(map(statistics.median, values.values())) > 0:
            yield figure, values


def draw(source):
    samples = json.loads(source.read_text())
    colours = {subject: pyplot.cm.tab20(number % 20) for number, subject in enumerate(samples)}
    found = list(rows(samples))
    bar_count = sum(len(values) + GAP for _, values in found)
    figure, axes = pyplot.subplots(figsize=(WIDTH_INCHES, max(2, BAR_INCHES * bar_count)), layout="constrained")
    place, places = 0, []
    for _, values in found:
        largest = max(map(statistics.median, values.values()))
        places.append(place + (len(values) - 1) / 2)
        for subject, taken in values.items():
            median = statistics.median(taken)
            spread = [[(median - min(taken)) / largest], [(max(taken) - median) / largest]]
            axes.barh(place, median / largest, xerr=spread, color=colours[subject])
            axes.text(0.005, place, f"{subject}: {median:.4g}", va="center", fontsize="x-small")
            place += 1
        place += GAP
    axes.set_yticks(places, [name for name, _ in found], fontsize="x-small")
    axes.set_ylim(place, -1)
    axes.set_xlim(left=0)
    axes.set_title(source.stem)
    figure.savefig(source.with_suffix(".svg"), metadata={"Date": None})
    pyplot.close(figure)
    print(source.with_suffix(".svg"))


for name in sys.argv[1:]:
    draw(Path(name))
