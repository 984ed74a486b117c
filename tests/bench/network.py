"""Measures the network of a VM and of QEMU in turn, round after round. Called by `tests/bench/network`; README.md explains the figures.

    peer (bench-peer) ── veth ── eth0 (bench-pod) ── tc ── TAP ── guest

The same wiring for both: `vmrun` makes its part of it itself, for QEMU it is made here."""

import argparse
import contextlib
import ctypes
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

PEER, POD = "bench-peer", "bench-pod"
GUEST, MAC = "192.0.2.2", "02:00:00:00:00:02"
ECHO_PORT = 7
# Of the guest, with what vmrun adds for kernel and agent.
MEMORY_MIB, OVERHEAD_MIB = 256, 96
START_DEADLINE_S = 120
WARM_UP_S = 2
# An emulated host loses a guest now and then.
ATTEMPTS = 4
CLONE_NEWNET = 0x40000000
KERNEL_PARAMETERS = (
    "console=ttyS0 quiet loglevel=1 reboot=t panic=-1 tsc=reliable no_timer_check noreplace-smp random.trust_cpu=on cryptomgr.notests"
)


def run(*words, **options):
    return subprocess.run([str(word) for word in words], check=True, text=True, stdout=subprocess.PIPE, **options).stdout


def ip(words):
    run("ip", *words.split())


class Wire:
    """Two namespaces and a veth pair between them."""

    def __enter__(self):
        for name in (PEER, POD):
            subprocess.run(["ip", "netns", "delete", name], stderr=subprocess.DEVNULL, check=False)
            ip(f"netns add {name}")
            ip(f"-n {name} link set lo up")
        ip(f"-n {PEER} link add peer0 type veth peer name eth0 address {MAC} netns {POD}")
        ip(f"-n {PEER} addr add 192.0.2.1/24 dev peer0")
        ip(f"-n {POD} addr add {GUEST}/24 dev eth0")
        ip(f"-n {PEER} link set peer0 up")
        ip(f"-n {POD} link set eth0 up")
        return self

    def __exit__(self, *_):
        for name in (PEER, POD):
            ip(f"netns delete {name}")

    def carried(self):
        """Frames and bytes that the guest has received and sent, as the host's kernel carries them: a large segment is one."""
        directory = "/sys/class/net/eth0/statistics"
        files = [f"{directory}/{side}_{unit}" for unit in ("packets", "bytes") for side in ("rx", "tx")]
        counts = [int(line) for line in run("ip", "netns", "exec", POD, "cat", *files).split()]
        return sum(counts[:2]), sum(counts[2:])


class Exits:
    """Counts the exits of a process's threads, in an own instance of tracefs."""

    EVENTS = {"exits": "kvm_exit", "userspace exits": "kvm_userspace_exit"}
    COUNTER = "hist:keys=common_pid"

    def __init__(self):
        self.directory = Path(f"/sys/kernel/tracing/instances/bench-network-{os.getpid()}")

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
    """`vmrun run --network netns:`."""

    def __init__(self, options, vhost):
        run_it = [os.environ["VMRUN"], "run", "--detach", "--name", "bench", "--privileged", "--memory", f"{MEMORY_MIB - OVERHEAD_MIB}m"]
        run_it += ["--network", f"netns:/run/netns/{POD}"] + ["--vhost-net"] * vhost
        run(*run_it, f"rootfs:{options.rootfs}", "/init")
        self.pid = json.loads(run(os.environ["VMRUN"], "inspect", "bench"))[0]["State"]["Pid"]

    def end(self):
        run(os.environ["VMRUN"], "rm", "--force", "bench")


class Qemu:
    """QEMU with our kernel. `-M pc`, because the kernel finds PCI without ACPI there, and microvm has none then."""

    TAP = "benchtap0"

    def __init__(self, options, vhost):
        ip(f"-n {POD} tuntap add {self.TAP} mode tap vnet_hdr")
        ip(f"-n {POD} link set {self.TAP} up")
        for source, target in (("eth0", self.TAP), (self.TAP, "eth0")):
            run("tc", "-n", POD, "qdisc", "add", "dev", source, "ingress")
            redirect = f"protocol all u32 match u8 0 0 action mirred egress redirect dev {target}"
            run("tc", "-n", POD, "filter", "add", "dev", source, "parent", "ffff:", *redirect.split())
        backend = f"tap,id=net,ifname={self.TAP},script=no,downscript=no,vhost={'on' if vhost else 'off'}"
        words = "qemu-system-x86_64 -M pc,usb=off,vmport=off -accel kvm -cpu host -smp 1 -nodefaults -no-user-config -display none -no-reboot"
        words = words.split() + ["-m", str(MEMORY_MIB), "-netdev", backend, "-serial", f"file:{options.json}.console"]
        words += ["-device", f"virtio-net-pci,netdev=net,mac={MAC},disable-legacy=on,romfile="]
        words += ["-kernel", os.environ["VMRUN_KERNEL"], "-initrd", options.initramfs, "-append", KERNEL_PARAMETERS]
        self.process = subprocess.Popen(["ip", "netns", "exec", POD] + words)
        self.pid = self.process.pid

    def end(self):
        self.process.kill()
        self.process.wait()
        ip(f"-n {POD} link delete {self.TAP}")
        run("tc", "-n", POD, "qdisc", "delete", "dev", "eth0", "ingress")


SUBJECTS = {
    "vmrun": (Vmrun, False),
    "QEMU": (Qemu, False),
    "vmrun, vhost-net": (Vmrun, True),
    "QEMU, vhost-net": (Qemu, True),
}


def as_peer(work):
    """Does something in the peer's namespace, on a thread of its own."""
    result = []

    def entered():
        with open(f"/run/netns/{PEER}") as namespace:
            if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), CLONE_NEWNET) != 0:
                raise OSError(ctypes.get_errno(), "setns")
        result.append(work())

    thread = threading.Thread(target=entered)
    thread.start()
    thread.join()
    if not result:
        raise RuntimeError("the work in the peer's namespace failed")
    return result[0]


def connect():
    client = socket.create_connection((GUEST, ECHO_PORT), timeout=START_DEADLINE_S)
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return client


def wait_for_guest():
    def dial():
        deadline = time.monotonic() + START_DEADLINE_S
        while True:
            try:
                with connect() as client:
                    client.sendall(b"x")
                    return client.recv(1)
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)

    as_peer(dial)


def round_trips(seconds):
    """One byte there and back, again and again; how many in a second."""

    def echo():
        with connect() as client:
            count, began = 0, time.monotonic()
            while time.monotonic() < began + seconds:
                client.sendall(b"x")
                if client.recv(1) != b"x":
                    raise RuntimeError("the echo ended")
                count += 1
            return count / (time.monotonic() - began)

    return as_peer(echo)


def throughput(seconds, *options):
    """Mbit/s of one TCP connection, as the receiver counts them."""
    words = ["ip", "netns", "exec", PEER, "iperf3", "--client", GUEST, "--time", seconds, "--json", *options]
    return json.loads(run(*words))["end"]["sum_received"]["bits_per_second"] / 1e6


MEASURES = {
    "round trips a second": round_trips,
    "Mbit/s to the guest": throughput,
    "Mbit/s from the guest": lambda seconds: throughput(seconds, "--reverse"),
}


def sample(name, options, wire, exits):
    """One start of a subject and all its measures."""
    make, vhost = SUBJECTS[name]
    subject = make(options, vhost)
    try:
        wait_for_guest()
        # What is done for the first time is slow, on an emulated host above all.
        for take in MEASURES.values():
            take(WARM_UP_S)
        figures = {}
        for measure, take in MEASURES.items():
            counts, before = {}, wire.carried()
            with exits.counted(subject.pid, counts):
                figures[measure] = take(options.seconds)
            frames, size = (after - earlier for after, earlier in zip(wire.carried(), before))
            figures[f"{measure}: bytes for each frame"] = size / frames
            for kind, count in counts.items():
                figures[f"{measure}: {kind} for each frame"] = count / frames
        return figures
    finally:
        subject.end()


def report(samples):
    """Medians, and their ratios to QEMU with the same backend."""
    names = list(SUBJECTS)
    print("| median of the rounds (lowest to highest) |", " | ".join(names), "| ratio | ratio, vhost-net |")
    print("|---|" + "---|" * (len(names) + 2))
    for figure in samples[names[0]][0]:
        values = {name: [taken[figure] for taken in samples[name]] for name in names}
        medians = {name: statistics.median(found) for name, found in values.items()}
        cells = [f"{medians[name]:.3g} ({min(values[name]):.3g} to {max(values[name]):.3g})" for name in names]
        ratios = []
        for ours, theirs in (names[:2], names[2:]):
            ratios.append(f"{medians[ours] / medians[theirs]:.2f}" if medians[theirs] else "-")
        print(f"| {figure} |", " | ".join(cells + ratios), "|")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("rootfs", "initramfs", "json"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("rounds", "seconds"):
        parser.add_argument(f"--{name}", type=int, required=True)
    options = parser.parse_args()
    samples = {name: [] for name in SUBJECTS}
    with Wire() as wire, Exits() as exits:
        for _ in range(options.rounds):
            for name in SUBJECTS:
                for attempt in range(1, ATTEMPTS + 1):
                    try:
                        samples[name].append(sample(name, options, wire, exits))
                        break
                    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
                        print(f"{name}, attempt {attempt}: {error}", file=sys.stderr)
                        if attempt == ATTEMPTS:
                            raise
    report(samples)
    Path(options.json).write_text(json.dumps(samples, indent=2))


main()
