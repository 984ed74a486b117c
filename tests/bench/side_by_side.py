"""What the benches of two machines have in common: both are started in turn, round after round, and have the same kernel and programs."""

import argparse
import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

# Of the guest, with what vmrun adds for kernel and agent.
MEMORY_MIB, OVERHEAD_MIB = 256, 96
START_DEADLINE_S = 120
# An emulated host loses a guest now and then.
ATTEMPTS = 4
KERNEL_PARAMETERS = (
    "console=ttyS0 quiet loglevel=1 reboot=t panic=-1 tsc=reliable no_timer_check noreplace-smp random.trust_cpu=on cryptomgr.notests"
)


def run(*words, **options):
    return subprocess.run([str(word) for word in words], check=True, text=True, stdout=subprocess.PIPE, **options).stdout


class Exits:
    """Counts the exits of a process's threads, in an own instance of tracefs."""

    EVENTS = {"exits": "kvm_exit", "userspace exits": "kvm_userspace_exit"}
    COUNTER = "hist:keys=common_pid"

    def __init__(self):
        self.directory = Path(f"/sys/kernel/tracing/instances/bench-{os.getpid()}")

    def __enter__(self):
        self.directory.mkdir()
        return self

    def __exit__(self, *_):
        self.directory.rmdir()

    @contextlib.contextmanager
    def counted(self, pid, counts):
        """Adds to `counts` what the threads of `pid` have had in the meantime."""
        triggers = {name: self.directory / "events/kvm" / event / "trigger" for name, event in self.EVENTS.items()}
        for trigger in triggers.values():
            trigger.write_text(self.COUNTER)
        yield
        threads = set(os.listdir(f"/proc/{pid}/task"))
        for name, trigger in triggers.items():
            rows = re.findall(r"common_pid:\s+(\d+) \} hitcount:\s+(\d+)", (trigger.parent / "hist").read_text())
            trigger.write_text("!" + self.COUNTER)
            counts[name] = sum(int(hits) for thread, hits in rows if thread in threads)


class Vmrun:
    """A container in the background. `--privileged`, because what it runs mounts and pings."""

    def __init__(self, name, options, rootfs, *words):
        self.name = name
        run_it = [os.environ["VMRUN"], "run", "--detach", "--name", name, "--privileged", "--memory", f"{MEMORY_MIB - OVERHEAD_MIB}m"]
        run(*run_it, *options, f"rootfs:{rootfs}", "/init", *words)
        self.pid = json.loads(run(os.environ["VMRUN"], "inspect", name))[0]["State"]["Pid"]

    def output(self):
        run(os.environ["VMRUN"], "wait", self.name)
        return run(os.environ["VMRUN"], "logs", self.name)

    def end(self):
        run(os.environ["VMRUN"], "rm", "--force", self.name)


class Qemu:
    """QEMU with our kernel. `-M pc`, because the kernel finds PCI without ACPI there, and microvm has none then."""

    def __init__(self, console, devices, initramfs, *words, variables="", within=(), fds=()):
        self.console = Path(console)
        command = "qemu-system-x86_64 -M pc,usb=off,vmport=off -accel kvm -cpu host -smp 1 -nodefaults -no-user-config -display none -no-reboot"
        command = command.split() + ["-m", str(MEMORY_MIB), "-serial", f"file:{console}", *devices]
        parameters = " ".join([KERNEL_PARAMETERS, variables, "--", *map(str, words)])
        command += ["-kernel", os.environ["VMRUN_KERNEL"], "-initrd", initramfs, "-append", parameters]
        self.process = subprocess.Popen([*within, *command], pass_fds=fds)
        self.pid = self.process.pid

    def output(self):
        self.process.wait()
        return self.console.read_text(errors="replace")

    def end(self):
        self.process.kill()
        self.process.wait()


def options_of(description, *numbers):
    """The command line: paths, and numbers that the bench has."""
    parser = argparse.ArgumentParser(description=description)
    for name in ("rootfs", "initramfs", "json"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("rounds", *numbers):
        parser.add_argument(f"--{name}", type=int, required=True)
    return parser.parse_args()


def compare(names, sample, options):
    """Takes a sample of each subject in every round; prints medians, and the ratio of each pair of subjects. `sample` maps figures to numbers."""
    samples = {name: [] for name in names}
    for _ in range(options.rounds):
        for name in names:
            for attempt in range(1, ATTEMPTS + 1):
                try:
                    samples[name].append(sample(name))
                    break
                except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
                    print(f"{name}, attempt {attempt}: {error}", file=sys.stderr)
                    if attempt == ATTEMPTS:
                        raise
    pairs = list(zip(names[::2], names[1::2]))
    titles = [*names, *(f"{ours} to {theirs}" for ours, theirs in pairs)]
    print("| median of the rounds (lowest to highest) |", " | ".join(titles), "|")
    print("|---|" + "---|" * len(titles))
    for figure in samples[names[0]][0]:
        values = {name: [taken[figure] for taken in samples[name]] for name in names}
        medians = {name: statistics.median(found) for name, found in values.items()}
        cells = [f"{medians[name]:.3g} ({min(values[name]):.3g} to {max(values[name]):.3g})" for name in names]
        ratios = [f"{medians[ours] / medians[theirs]:.2f}" if medians[theirs] else "-" for ours, theirs in pairs]
        print(f"| {figure} |", " | ".join(cells + ratios), "|")
    Path(options.json).write_text(json.dumps(samples, indent=2))
