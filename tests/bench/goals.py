"""Prints each goal and what was measured for it: medians of the rounds, from the JSON files that the benches have written."""

import json
import operator
import statistics
import sys
from pathlib import Path

AT_MOST, AT_LEAST = ("at most", operator.le), ("at least", operator.ge)
KIB_OF_MIB = 1024
MILLION = 1e6


class Bench(dict):
    """Medians by subject and figure."""

    def __init__(self, source):
        for subject, runs in json.loads(source.read_text()).items():
            for figure in dict.fromkeys(figure for run in runs for figure in run):
                self[subject, figure] = statistics.median(run[figure] for run in runs if figure in run)

    def ratio(self, ours, theirs, figure):
        return self[ours, figure] / self[theirs, figure]


def of_instructions(bench):
    run, qemu = "vmrun run, traced", "QEMU microvm, traced"
    ready, end, command, line = "until the agent is ready", "stop, from the guest's end", "until the command", "until the first line"
    more = lambda kind, figure: 100 * bench.ratio(f"vmrun run, {kind}", f"vmrun run, VMM not confined, {kind}", figure) - 100
    exec_on_host = bench["vmrun exec", "instructions"] - bench["vmrun exec, its guest", "guest"]
    yield "a start until the agent is ready, to QEMU microvm", AT_MOST, 0.5, bench.ratio(run, qemu, ready)
    yield "`vmrun run` to `runc run`", AT_MOST, 3, bench.ratio("vmrun run", "runc run", "instructions")
    yield "million of the guest until the agent is ready", AT_MOST, 60, bench["vmrun run, its guest", f"guest {ready}"] / MILLION
    yield "the host's part of `vmrun exec`, to `runc exec`", AT_MOST, 0.5, exec_on_host / bench["runc exec", "instructions"]
    yield "a stop from the guest's last exit, to QEMU's", AT_MOST, 0.5, bench.ratio(run, qemu, end)
    yield "a stop from the command's first instruction, to the same", AT_MOST, 0.5, bench[run, "stop, from the command"] / bench[qemu, end]
    yield "more by confinement until the command, %", AT_MOST, 3, more("traced", command)
    yield "more by confinement until the first line, %", AT_MOST, 3, more("line traced", line)


def of_start(bench):
    run, idle, qemu = "vmrun run", "vmrun idle", "qemu"
    yield "userspace exits until the agent is ready", AT_MOST, 600, bench[run, "agent.userspace exits"]
    yield "the same, to QEMU microvm", AT_MOST, 0.5, bench.ratio(run, qemu, "agent.userspace exits")
    yield "exits until the agent is ready, to QEMU microvm", AT_MOST, 0.5, bench.ratio(run, qemu, "agent.exits")
    yield "host system calls of vmrun and vmm, a cold run", AT_MOST, 700, bench[run, "run.system calls"]
    yield "host system calls until the command, to `runc run`", AT_MOST, 3, bench.ratio(run, "runc", "command.system calls")
    yield "the same of `vmrun exec`, to `runc run`", AT_MOST, 0.5, bench.ratio("vmrun exec", "runc", "command.system calls")
    yield "host system calls of vmrun for an address of a pod", AT_MOST, 10, bench["vmrun address", "system calls for an address"]
    yield "system calls of a stop, to QEMU microvm", AT_MOST, 0.5, bench.ratio(run, qemu, "stop.system calls")
    yield "page faults of a stop, to QEMU microvm", AT_MOST, 0.5, bench.ratio(run, qemu, "stop.host page faults")
    yield "private memory of vmrun and vmm beside another VM, KiB", AT_MOST, 6 * KIB_OF_MIB, bench[idle, "idle.private KiB"]
    yield "one more idle VM of 128 MiB, all that the host has for it, KiB", AT_MOST, 28 * KIB_OF_MIB, bench[idle, "idle.used KiB"]
    yield "processes of an idle VM beside another, proportional, KiB", AT_MOST, 28 * KIB_OF_MIB, bench[idle, "idle.total KiB"]
    yield "private memory of shim and vmm beside another pod, KiB", AT_MOST, 6 * KIB_OF_MIB, bench["containerd exec", "idle.private KiB"]
    yield "time to the first output, containerd to `vmrun run`", AT_MOST, 1.5, bench["containerd output", "first output us"] / bench["vmrun output", "first output us"]
    yield "time of `true` in a container of containerd, to the same with runc", AT_MOST, 1, bench.ratio("containerd exec", "containerd exec, runc", "exec us")


def of_files(bench):
    data, metadata = ("sequential-write", "sequential-read", "random-write", "random-read"), ("create", "stat", "unlink")
    for parts, least in ((data, 1.2), (metadata, 1.5)):
        for part in parts:
            figure = f"{part}: operations a second"
            yield f"{part} a second, to QEMU and virtiofsd", AT_LEAST, least, bench.ratio("vmrun", "QEMU and virtiofsd", figure)
    yield "exits for each stat", AT_MOST, 1, bench["vmrun", "stat: exits for each"]


def of_vsock(bench):
    for part in ("round trips", "MiB to the guest", "MiB from the guest"):
        figure = f"{part}: a second"
        yield f"{part} a second, to QEMU and vhost-vsock", AT_LEAST, 1, bench.ratio("vmrun", "QEMU and vhost-vsock", figure)


GOALS = {"bench-instructions": of_instructions, "bench": of_start, "bench-files": of_files, "bench-vsock": of_vsock}

sources = {source.stem: source for source in map(Path, sys.argv[1:])}
print("| bench | what | goal | measured | |\n|---|---|---|---|---|")
for name in filter(sources.get, GOALS):
    for what, (limit, holds), bound, measured in GOALS[name](Bench(sources[name])):
        shown = f"{measured:.0f}" if measured >= 1000 else f"{measured:.3g}"
        print(f"| {name} | {what} | {limit} {bound} | {shown} | {'met' if holds(measured, bound) else 'missed'} |")
