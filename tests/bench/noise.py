"""Prints how far a subject is from itself: for each JSON file of a bench and each subject of it, the medians of its odd and of its even rounds,
which lie between each other as those of two subjects do."""

import json
import statistics
import sys
from pathlib import Path


def distances(runs):
    """Figures, and how far their odd rounds are from the even ones, in percent."""
    for figure in runs[0]:
        odd, even = ([run[figure] for run in half if figure in run] for half in (runs[::2], runs[1::2]))
        if odd and even and statistics.median(even):
            yield abs(100 * statistics.median(odd) / statistics.median(even) - 100), figure


print("| bench | subject against itself | figures | middle | largest |\n|---|---|---|---|---|")
for source in map(Path, sys.argv[1:]):
    for subject, runs in json.loads(source.read_text()).items():
        found = sorted(distances(runs))
        if found:
            middle, (largest, worst) = statistics.median(distance for distance, _ in found), found[-1]
            print(f"| {source.stem} | {subject} | {len(found)} | {middle:.2g} % | {largest:.2g} % ({worst}) |")
