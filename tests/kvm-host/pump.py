"""Copies one stream of a command between a pipe or pty and its connection. Used by session.py; never blocks."""
import os
import select

CHUNK = 1 << 17
PTY_SETTLE_MS = 300


class Pump:
    """Owns both descriptors. Closes both as soon as either end is gone: that is how an end of file or a broken pipe travels on."""

    def __init__(self, source, target, is_pty):
        self.source, self.target, self.is_pty = source, target, is_pty
        self.chunk = b""  # read, not yet written
        self.moved_len = 0
        for fd in (source, target):
            os.set_blocking(fd, False)

    @property
    def is_open(self):
        return self.source is not None

    def interests(self):
        if not self.is_open:
            return []
        if self.chunk:
            return [(self.target, select.POLLOUT)]
        # The target has nothing to say, but POLLRDHUP or POLLERR there tells that nobody reads it any more.
        return [(self.source, select.POLLIN), (self.target, select.POLLRDHUP)]

    def step(self, ready):
        """One read and one write at most. True when something moved."""
        if not self.is_open or not (ready.get(self.source) or ready.get(self.target)):
            return False
        if not self.chunk and ready.get(self.target):
            self.close()
            return False
        try:
            self.chunk = self.chunk or os.read(self.source, CHUNK)
            count = os.write(self.target, self.chunk) if self.chunk else self.close() or 0
        except BlockingIOError:
            return False
        except OSError:  # EIO: no process has the pty open; EPIPE, ECONNRESET: nobody reads
            self.close()
            return False
        self.chunk = self.chunk[count:]
        self.moved_len += count
        return True

    def drain(self, control_fd, obey):
        """After the command's end: pass on what it wrote before. Daemons it left behind may hold the source open for ever."""
        # Bytes on a pty go through a kernel work queue, so an empty pty is not at its end at once; a pipe is.
        settle_ms = PTY_SETTLE_MS if self.is_pty else 0
        while self.is_open:
            ready = poll([(control_fd, select.POLLIN), *self.interests()], None if self.chunk else settle_ms)
            if ready.get(control_fd) and not obey():
                return
            if not self.step(ready) and not self.chunk and not ready.get(control_fd):
                return

    def close(self):
        self.chunk = b""
        for fd in (self.source, self.target):
            if fd is not None:
                os.close(fd)
        self.source = self.target = None

    def detach_target(self):
        """Close the connection; keep the source so that daemons can go on writing into it."""
        if self.is_open:
            os.close(self.target)
            self.target = os.open("/dev/null", os.O_WRONLY)


def poll(interests, timeout_ms=None):
    """Ready descriptors with their events. A descriptor may be named more than once."""
    masks = {}
    for fd, mask in interests:
        masks[fd] = masks.get(fd, 0) | mask
    poller = select.poll()
    for fd, mask in masks.items():
        poller.register(fd, mask)
    return dict(poller.poll(timeout_ms))
