"""Measures files of the host in a VM and in QEMU with virtiofsd in turn, round after round. Called by `tests/bench/files`; README.md explains the
figures. What the guest does is in `workload.rs`."""

import subprocess
import tempfile
import time
from pathlib import Path

from side_by_side import MEMORY_MIB, START_DEADLINE_S, Exits, Qemu, Vmrun, compare, options_of

# How far apart two looks for the guest's answer are.
PAUSE_S = 0.02
# Longest time for one part, which emulation makes long.
PART_DEADLINE_S = 600
PARTS = ("sequential-write", "sequential-read", "random-write", "random-read", "create", "stat", "unlink")
# Debian has it beside QEMU until QEMU 7.2, and later in a package of its own.
VIRTIOFSD = ("/usr/lib/qemu/virtiofsd", "/usr/libexec/virtiofsd")


def vmrun(options, folder):
    return Vmrun("bench", ["--volume", f"{folder}/share:/share"], options.rootfs, options.operations)


class SharingQemu(Qemu):
    """With virtiofsd as it is by default, but for its sandbox: that wants namespaces, which change nothing of what is measured."""

    def __init__(self, options, folder):
        program = next(path for path in VIRTIOFSD if Path(path).exists())
        socket = f"{folder}/socket"
        command = [program, f"--socket-path={socket}", "-o", f"source={folder}/share,sandbox=chroot"]
        self.server = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        wait_for(Path(socket), START_DEADLINE_S)
        devices = ["-object", f"memory-backend-memfd,id=ram,size={MEMORY_MIB}M,share=on", "-numa", "node,memdev=ram"]
        devices += ["-chardev", f"socket,id=share,path={socket}", "-device", "vhost-user-fs-pci,chardev=share,tag=share"]
        super().__init__(f"{options.json}.console", devices, options.initramfs, options.operations)

    def end(self):
        super().end()
        self.server.kill()
        self.server.wait()


SUBJECTS = {"vmrun": vmrun, "QEMU and virtiofsd": SharingQemu}


def wait_for(path, deadline_s):
    deadline = time.monotonic() + deadline_s
    while not path.exists():
        if time.monotonic() > deadline:
            raise RuntimeError(f"{path.name} did not come in {deadline_s} s")
        time.sleep(PAUSE_S)


def sample(name, options, exits):
    """One start of a subject and all parts of the work."""
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        share = Path(folder, "share")
        share.mkdir()
        subject = SUBJECTS[name](options, folder)
        try:
            for part in PARTS:
                counts, done = {}, share / f"done-{part}"
                with exits.counted(subject.pid, counts):
                    (share / f"go-{part}").touch()
                    wait_for(done, START_DEADLINE_S + PART_DEADLINE_S)
                operations, took_ns = map(int, done.read_text().split())
                figures[f"{part}: operations a second"] = operations * 1e9 / took_ns
                for kind, count in counts.items():
                    figures[f"{part}: {kind} for each"] = count / operations
        finally:
            subject.end()
    return figures


def main():
    options = options_of(__doc__, "operations")
    with Exits() as exits:
        compare(list(SUBJECTS), lambda name: sample(name, options, exits), options)


main()
