"""Instructions from a command line to the container's first line of output, by a clock that counts them. Called by `instructions`."""

import argparse
import contextlib
import json
import os
import re
import select
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# A line at once, and then nothing.
COMMAND = ["sh", "-c", "echo ready; exec sleep 1000"]
# As in `src/bin/bench/subjects.rs`: QEMU's guest has no vsock, so the agent resets it where it would dial the host.
QEMU = """-M microvm,pit=off,pic=off,rtc=off,isa-serial=off,auto-kernel-cmdline=off -accel kvm -cpu host -smp 1 -m 128 -nodefaults
    -no-user-config -display none -no-reboot""".split()
QEMU_COMMAND_LINE = """quiet loglevel=1 reboot=t panic=-1 tsc=reliable no_timer_check noreplace-smp random.trust_cpu=on cryptomgr.notests"""
QEMU_FIRMWARE = "bios-microvm.bin", "pvh.bin"
CGROUPS = Path("/sys/fs/cgroup")
# Enters the cgroup, and the trace if there is one, then becomes the command. Python itself would count as well until then.
LAUNCH = ["/bin/busybox", "sh", "-c", 'echo 0 >"$0" && { [ -z "$1" ] || echo $$ >>"$1"; } && shift && exec "$@"']
# What has been scheduled away by then is accounted.
SETTLE_S = 0.2
# A container that runs has said by then which of its pages are free.
REST_S = 5
# By the host's clock: a billion instructions.
SILENT_S = 1
EVENT = re.compile(r"\s*(?P<thread>.+)-(?P<tid>\d+)\s+\[\d+\] \S+\s+(?P<time>\d+): (?P<name>\w+)[:(](?P<fields>.*)")
# The main thread, which passes the agent's connection on.
VMM = "vmm", "unconfined"
# Windows of a stop.
FROM_THE_COMMAND, FROM_THE_END = "stop, from the command", "stop, from the guest's end"
# A system call that writes as much as the first line has.
FIRST_LINE = re.compile(r"count: 6\b")
# The leaf of CPUID that the first instruction of `marker.rs` asks for.
MARKER_LEAF = "func 4f4b0001 "


class Cgroup:
    """A cgroup with one for the command and room for those of what it starts."""

    def __init__(self, name):
        self.name = f"/{name}"
        self.path = CGROUPS / name

    def __enter__(self):
        self.path.mkdir()
        controllers = (self.path / "cgroup.controllers").read_text().split()
        (self.path / "cgroup.subtree_control").write_text(" ".join(f"+{name}" for name in controllers))
        (self.path / "command").mkdir()
        return self

    def __exit__(self, *_):
        (self.path / "cgroup.kill").write_text("1")
        while "populated 1" in (self.path / "cgroup.events").read_text():
            time.sleep(0.01)
        for folder, _, _ in os.walk(self.path, topdown=False):
            os.rmdir(folder)

    def used(self):
        """CPU time of all in it, in nanoseconds, each of which is an instruction."""
        stat = (self.path / "cpu.stat").read_text()
        return int(re.search(r"usage_usec (\d+)", stat)[1]) * 1000

    def launch(self, command, trace=None):
        """The words that run `command` in it."""
        words = [str(word).replace("CGROUP", self.name) for word in command]
        return [*LAUNCH, self.path / "command/cgroup.procs", trace.path / "set_event_pid" if trace else "", *words]

    def threads(self):
        """All in it."""
        return [thread for folder, _, _ in os.walk(self.path) for thread in Path(folder, "cgroup.threads").read_text().split()]


class Trace:
    """Events of the command and of all that it starts, in an own instance of tracefs."""

    def __enter__(self):
        self.path = Path(f"/sys/kernel/tracing/instances/bench-{os.getpid()}")
        self.path.mkdir()
        for file, value in ("trace_clock", "x86-tsc"), ("buffer_size_kb", "65536"), ("options/event-fork", "1"):
            (self.path / file).write_text(value)
        for event in self.EVENTS:
            (self.path / "events" / event / "enable").write_text("1")
        return self

    def __exit__(self, *_):
        self.path.rmdir()

    def follow(self, threads):
        """Records what runs already as well."""
        (self.path / "set_event_pid").write_text(" ".join(threads))

    def events(self):
        """Each event with its moment, until now."""
        (self.path / "tracing_on").write_text("0")
        for event in filter(None, map(EVENT.match, (self.path / "trace").read_text().splitlines())):
            yield event["name"], int(event["time"]), event


class Guest(Trace):
    """What the guest has executed in all, and when the VMM passed its agent's connection on."""

    EVENTS = ("kvm/kvm_entry", "kvm/kvm_exit", "syscalls/sys_enter_sendmsg")

    def counts(self):
        entered, executed, agent = None, 0, None
        for name, moment, event in self.events():
            if name == "kvm_entry":
                entered = moment
            elif name == "kvm_exit" and entered:
                executed += moment - entered
                entered = None
            elif name == "sys_sendmsg" and executed and agent is None and event["thread"] in VMM:
                agent = executed
        return {"guest": executed, "guest until the agent is ready": agent}


class Windows(Trace):
    """CPU time of all: from the start to where the agent is ready and to the command's first instruction, from that and from the guest's last exit to
    the end; or to the first line of a command that goes on. A guest that has nobody to be ready for, and runs no command, is ready with its last exit."""

    EVENTS = (
        *("sched/sched_switch", "sched/sched_process_fork", "kvm/kvm_exit", "kvm/kvm_cpuid"),
        *("syscalls/sys_enter_sendmsg", "syscalls/sys_enter_write"),
    )

    def counts(self):
        threads, running, since, used = set(), None, 0, 0
        last_exit = agent = command = None
        for name, moment, event in self.events():
            thread = int(event["tid"])
            if not threads:
                threads, running, since = {thread}, thread, moment
            now = used + (moment - since if running else 0)
            match name:
                case "sched_process_fork":
                    threads.add(int(re.search(r"child_pid=(\d+)", event["fields"])[1]))
                case "sched_switch":
                    used = now
                    running = int(re.search(r"next_pid=(\d+)", event["fields"])[1])
                    running, since = running if running in threads else None, moment
                case "kvm_exit":
                    last_exit = now
                case "kvm_cpuid" if MARKER_LEAF in event["fields"]:
                    command = now
                case "sys_sendmsg" if last_exit and agent is None and event["thread"] in VMM:
                    agent = now
                case "sys_write" if last_exit and FIRST_LINE.search(event["fields"]):
                    return {"until the first line": now}
        of_command = {"until the command": command, FROM_THE_COMMAND: used - command} if command else {}
        return {"until the agent is ready": agent or last_exit} | of_command | {FROM_THE_END: used - last_exit}


class Silent(Exception):
    """Nothing was printed: the emulator interrupts a guest that has interrupts off, which then waits for itself. One start in some dozens."""


def again_if_silent(run):
    for _ in range(3):
        with contextlib.suppress(Silent):
            return run()
        print("no output, once more", file=sys.stderr)
    raise Silent


def until_output(command, environment, traced=contextlib.nullcontext, expected=b"ready\n"):
    """Starts a command and waits for its first line, or its end; returns what that took, and removes all that was started."""
    with Cgroup(f"bench-{os.getpid()}") as cgroup, traced() as trace:
        words = cgroup.launch(command, trace)
        process = subprocess.Popen(words, env={**os.environ, **environment}, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)
        if not select.select([process.stdout], [], [], SILENT_S)[0]:
            process.kill()
            process.wait()
            raise Silent
        line = process.stdout.readline()
        assert line == expected, line
        if not expected:
            process.wait()
        counts = trace.counts() if trace else {}
        time.sleep(SETTLE_S)
        used = cgroup.used()
        process.kill()
        process.wait()
        return counts or {"instructions": used}


def in_running(start, command, end, traced=contextlib.nullcontext):
    """Runs a command in a container that has rested, for the second time there; returns what that took."""
    quiet = {"check": True, "stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
    with Cgroup(f"bench-{os.getpid()}") as cgroup:
        subprocess.run(cgroup.launch(start), **quiet)
        try:
            subprocess.run(cgroup.launch(command), **quiet)
            time.sleep(REST_S)
            with traced() as trace:
                before = cgroup.used()
                if trace:
                    trace.follow(cgroup.threads())
                subprocess.run(cgroup.launch(command, trace), **quiet)
                counts = trace.counts() if trace else {}
            time.sleep(SETTLE_S)
            return {"guest": counts["guest"]} if trace else {"instructions": cgroup.used() - before}
        finally:
            subprocess.run(end, **quiet)


class Subjects:
    """Who runs the command, and how. Programs are in memory: what an emulated host takes to read its files is not ours."""

    def __init__(self, folder, unfiltered, initramfs, marker):
        self.folder = folder
        self.qemu_command = copy_qemu(folder / "qemu", initramfs)
        # What its name says, it does.
        self.unconfined = shutil.copy(unfiltered, folder / "unconfined")
        for variable in "VMRUN", "VMRUN_VMM", "VMRUN_KERNEL", "VMRUN_ROOTFS":
            os.environ[variable] = shutil.copy(os.environ[variable], folder)
        rootfs = folder / "rootfs"
        for name in "bin", "dev", "etc", "proc", "sys", "tmp":
            (rootfs / name).mkdir(parents=True)
        subprocess.run(["cp", "/bin/busybox", rootfs / "bin"], check=True)
        shutil.copy(marker, rootfs)
        for name in "sh", "sleep":
            (rootfs / "bin" / name).symlink_to("busybox")
        subprocess.run(["runc", "spec"], check=True, cwd=folder)
        config = json.loads((folder / "config.json").read_text())
        config["process"] |= {"terminal": False, "args": COMMAND}
        config["linux"]["cgroupsPath"] = f"/bench-{os.getpid()}/container"
        (folder / "config.json").write_text(json.dumps(config))

    def words(self):
        return [os.environ["VMRUN"], "--root", self.folder / "run", "--data-root", self.folder / "data"]

    def run_words(self, *options):
        image = f"rootfs:{self.folder / 'rootfs'}"
        return [*self.words(), "--cgroup-parent", "CGROUP/vms", "run", *options, "--memory", "128m", image]

    def vmrun(self, vmm=None, command=COMMAND, **options):
        environment = {"VMRUN_VMM": vmm} if vmm else {}
        counts = until_output([*self.run_words("--rm"), *command], environment, **options)
        subprocess.run([*self.words(), "gc"], check=True, stdout=subprocess.DEVNULL)
        return counts

    def windows(self, vmm=None):
        return self.vmrun(vmm, command=["/marker"], traced=Windows, expected=b"")

    def vmrun_exec(self, **options):
        start = [*self.run_words("--detach", "--name", "bench"), "sleep", "1000"]
        return in_running(start, [*self.words(), "exec", "bench", "/marker"], [*self.words(), "rm", "--force", "bench"], **options)

    def runc_exec(self):
        start = ["runc", "run", "--detach", "--bundle", self.folder, "bench"]
        return in_running(start, ["runc", "exec", "bench", "/marker"], ["runc", "delete", "--force", "bench"])

    def runc(self):
        counts = until_output(["runc", "run", "--bundle", self.folder, "bench"], {})
        subprocess.run(["runc", "delete", "--force", "bench"], check=True)
        return counts

    def qemu(self, **options):
        kernel = ["-kernel", os.environ["VMRUN_KERNEL"], "-append", QEMU_COMMAND_LINE]
        libraries = {"LD_LIBRARY_PATH": str(self.folder / "qemu")}
        return until_output([*self.qemu_command, *kernel], libraries, expected=b"", **options)

    def all(self):
        return {
            "vmrun run": self.vmrun,
            "vmrun run, its guest": lambda: self.vmrun(traced=Guest),
            "vmrun run, traced": self.windows,
            "vmrun run, VMM not confined, traced": lambda: self.windows(self.unconfined),
            "vmrun run, line traced": lambda: self.vmrun(traced=Windows),
            "vmrun run, VMM not confined, line traced": lambda: self.vmrun(self.unconfined, traced=Windows),
            "runc run": self.runc,
            "vmrun exec": self.vmrun_exec,
            "vmrun exec, its guest": lambda: self.vmrun_exec(traced=Guest),
            "runc exec": self.runc_exec,
            "QEMU microvm to the agent": self.qemu,
            "QEMU microvm, traced": lambda: self.qemu(traced=Windows),
        }


def copy_qemu(folder, initramfs):
    """QEMU with its libraries and firmware; returns its command line but for the kernel."""
    folder.mkdir()
    program = shutil.copy(shutil.which("qemu-system-x86_64"), folder)
    for library in re.findall(r"=> (/\S+)", subprocess.check_output(["ldd", program], text=True)):
        shutil.copy(library, folder)
    for name in QEMU_FIRMWARE:
        shutil.copy(next(path for share in ("qemu", "seabios") if (path := Path("/usr/share", share, name)).exists()), folder)
    return [program, "-L", folder, *QEMU, "-initrd", shutil.copy(initramfs, folder)]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--unfiltered", required=True)
    parser.add_argument("--initramfs", required=True)
    parser.add_argument("--marker", required=True)
    parser.add_argument("--json", required=True, type=Path)
    parser.add_argument("--rounds", type=int, required=True)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        subjects = Subjects(Path(folder), arguments.unfiltered, arguments.initramfs, arguments.marker).all()
        samples = {}
        for number in range(arguments.rounds + 1):
            for name, run in subjects.items():
                counts = again_if_silent(run)
                # What is read for the first time comes from the disk.
                if number:
                    samples.setdefault(name, []).append(counts)
    arguments.json.write_text(json.dumps(samples, indent=2))
    print("| million instructions to the first line of output | median | lowest to highest |\n|---|---|---|")
    for name, runs in samples.items():
        for count in runs[0]:
            values = [run[count] / 1e6 for run in runs]
            print(f"| {name}{'' if count == 'instructions' else ': ' + count} | {statistics.median(values):.1f} | {min(values):.1f} to {max(values):.1f} |")


if __name__ == "__main__":
    main()
