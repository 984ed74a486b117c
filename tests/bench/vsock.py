"""Measures vsock of a VM and vhost-vsock of QEMU in turn, round after round. Called by `tests/bench/vsock`; README.md explains the figures. What the
guest does is in `vsock-init.rs`."""

import contextlib
import json
import os
import socket
import subprocess
import tempfile
import time

from side_by_side import MEMORY_MIB, START_DEADLINE_S, Exits, Qemu, compare, options_of, run

PORT, GUEST_CID = 1024, 3
ROUND_TRIPS, MESSAGE_LEN = 2000, 64
# The first ones wake what sleeps.
WARM_UP_ROUND_TRIPS = 200
CHUNK_LEN = 64 << 10


class Vmm:
    """The VMM alone, with the bench's program as the guest's first process: of vmrun's guests only the agent may dial the host."""

    def __init__(self, options):
        self.control, control = socket.socketpair()
        self.port, port = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.port.settimeout(START_DEADLINE_S)
        with contextlib.ExitStack() as opened:
            kernel, image = (opened.enter_context(open(path, "rb")) for path in (os.environ["VMRUN_KERNEL"], options.rootfs))
            config = opened.enter_context(tempfile.TemporaryFile("w+"))
            vsock = {"guest_cid": GUEST_CID, "host_ports": [{"port": PORT, "socket": port.fileno()}]}
            sizes = {"vcpus": 1, "boot_vcpus": 1, "memory_mib": MEMORY_MIB}
            files = {"kernel": kernel.fileno(), "root_image": image.fileno(), "control": control.fileno()}
            rest = {"name": "bench", "cmdline": "", "entropy": False, "shares": [], "networks": []}
            json.dump({**sizes, **files, **rest, "vsock": vsock}, config)
            config.seek(0)
            passed = [config.fileno(), *files.values(), port.fileno()]
            command = [os.environ["VMRUN_VMM"], "--config-fd", str(config.fileno())]
            self.process = subprocess.Popen(command, pass_fds=passed)
        control.close()
        port.close()
        self.pid = self.process.pid

    def connection(self):
        _, fds, _, _ = socket.recv_fds(self.port, 1, 1)
        return socket.socket(fileno=fds[0])

    def end(self):
        self.control.close()
        self.process.wait()


class VhostQemu(Qemu):
    def __init__(self, options):
        self.listener = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
        self.listener.bind((socket.VMADDR_CID_ANY, PORT))
        self.listener.listen()
        self.listener.settimeout(START_DEADLINE_S)
        super().__init__(f"{options.json}.console", ["-device", f"vhost-vsock-pci,guest-cid={GUEST_CID}"], options.initramfs)

    def connection(self):
        return self.listener.accept()[0]

    def end(self):
        super().end()
        self.listener.close()


SUBJECTS = {"vmrun": Vmm, "QEMU and vhost-vsock": VhostQemu}


def order(guest, letter, *numbers):
    guest.sendall(letter + b"".join(number.to_bytes(8, "little") for number in numbers))


def receive(guest, count):
    chunk = bytearray(CHUNK_LEN)
    while count:
        received = guest.recv_into(chunk, min(count, CHUNK_LEN))
        if not received:
            raise RuntimeError("the guest has ended")
        count -= received


def round_trips(guest, count):
    message = b"v" * MESSAGE_LEN
    order(guest, b"e", MESSAGE_LEN, count)
    for _ in range(count):
        guest.sendall(message)
        receive(guest, MESSAGE_LEN)


def to_guest(guest, count):
    chunk = b"v" * CHUNK_LEN
    order(guest, b"r", count)
    for _ in range(count // CHUNK_LEN):
        guest.sendall(chunk)
    receive(guest, 1)


def from_guest(guest, count):
    order(guest, b"w", count)
    receive(guest, count)


def sample(name, options, exits):
    """One start of a subject and all parts of the work."""
    parts = (
        ("round trips", round_trips, ROUND_TRIPS, 1),
        ("MiB to the guest", to_guest, options.mebibytes << 20, 1 << 20),
        ("MiB from the guest", from_guest, options.mebibytes << 20, 1 << 20),
    )
    figures = {}
    subject = SUBJECTS[name](options)
    try:
        with subject.connection() as guest:
            guest.settimeout(START_DEADLINE_S)
            round_trips(guest, WARM_UP_ROUND_TRIPS)
            for part, work, count, unit in parts:
                counts = {}
                with exits.counted(subject.pid, counts):
                    began = time.monotonic()
                    work(guest, count)
                    took = time.monotonic() - began
                figures[f"{part}: a second"] = count / unit / took
                for kind, counted in counts.items():
                    figures[f"{part}: {kind} for each"] = counted * unit / count
    finally:
        subject.end()
    return figures


def main():
    options = options_of(__doc__, "mebibytes")
    run("modprobe", "vhost_vsock")
    with Exits() as exits:
        compare(list(SUBJECTS), lambda name: sample(name, options, exits), options)


main()
