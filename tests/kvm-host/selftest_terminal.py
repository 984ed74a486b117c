"""Drives tests/on-kvm from a terminal of 37 rows and 91 columns. Prints ok, or what did not happen."""
import fcntl
import os
import pty
import select
import signal
import struct
import sys
import termios
import time

SCRIPT = "tty; stty size; trap 'echo resized $(stty size)' WINCH; trap 'echo interrupted; exit 9' INT; echo ready; " \
    "while :; do sleep 0.1; done"
DEADLINE_S = 60


def main(on_kvm):
    pid, master = pty.fork()
    if pid == 0:
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 37, 91, 0, 0))
        os.execv(on_kvm, [on_kvm, "sh", "-c", SCRIPT])
    await_output(master, "/dev/pts/", "37 91", "ready")
    fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", 41, 99, 0, 0))
    await_output(master, "resized 41 99")
    os.write(master, b"\x03")
    await_output(master, "interrupted")
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    print("ok" if code == 9 else f"exit status {code}")


def await_output(master, *texts):
    seen, deadline = "", time.monotonic() + DEADLINE_S
    while not all(text in seen for text in texts):
        if not select.select([master], [], [], max(0, deadline - time.monotonic()))[0]:
            sys.exit(f"waited for {texts}, saw {seen!r}")
        try:
            seen += os.read(master, 4096).decode(errors="replace")
        except OSError:
            sys.exit(f"ended before {texts}: {seen!r}")


if __name__ == "__main__":
    signal.alarm(3 * DEADLINE_S)
    main(sys.argv[1])
