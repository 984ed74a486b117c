"""Runs LOOP_COUNT instructions of guest kernel mode under /dev/kvm and prints how long that took; exits 1 when they do not run.

A KVM that emulates ring 0 an instruction at a time (kvm_pvm) needs seconds for what takes hardware, or TCG's SVM, milliseconds.
"""
import ctypes
import fcntl
import mmap
import os
import struct
import sys
import time

KVM_CREATE_VM, KVM_CREATE_VCPU, KVM_GET_VCPU_MMAP_SIZE, KVM_RUN = 0xAE01, 0xAE41, 0xAE04, 0xAE80
KVM_SET_USER_MEMORY_REGION, KVM_GET_REGS, KVM_SET_REGS = 0x4020AE46, 0x8090AE81, 0x4090AE82
KVM_GET_SREGS, KVM_SET_SREGS = 0x8138AE83, 0x4138AE84
KVM_EXIT_HLT = 5
RFLAGS_INDEX, RIP_INDEX = 17, 16
CODE_ADDRESS = 0x1000
LOOP_COUNT = 10_000_000
# mov ecx, LOOP_COUNT; dec ecx; jnz back; hlt (real mode)
CODE = b"\x66\xb9" + struct.pack("<I", LOOP_COUNT) + b"\x66\x49" + b"\x75\xfc" + b"\xf4"


def main():
    kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    vm = fcntl.ioctl(kvm, KVM_CREATE_VM, 0)
    memory = mmap.mmap(-1, 0x10000)
    memory[CODE_ADDRESS:CODE_ADDRESS + len(CODE)] = CODE
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    fcntl.ioctl(vm, KVM_SET_USER_MEMORY_REGION, struct.pack("<IIQQQ", 0, 0, 0, len(memory), address))
    vcpu = fcntl.ioctl(vm, KVM_CREATE_VCPU, 0)
    run = mmap.mmap(vcpu, fcntl.ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0))

    sregs = bytearray(fcntl.ioctl(vcpu, KVM_GET_SREGS, bytes(0x138)))
    sregs[0:8] = bytes(8)  # cs.base
    sregs[12:14] = bytes(2)  # cs.selector
    fcntl.ioctl(vcpu, KVM_SET_SREGS, bytes(sregs))
    regs = list(struct.unpack("<18Q", fcntl.ioctl(vcpu, KVM_GET_REGS, bytes(0x90))))
    regs[RIP_INDEX], regs[RFLAGS_INDEX] = CODE_ADDRESS, 2
    fcntl.ioctl(vcpu, KVM_SET_REGS, struct.pack("<18Q", *regs))

    started = time.monotonic()
    fcntl.ioctl(vcpu, KVM_RUN, 0)
    duration_ms = (time.monotonic() - started) * 1000
    exit_reason = struct.unpack_from("<I", run, 8)[0]
    print(f"exit reason {exit_reason}, {2 * LOOP_COUNT} instructions in {duration_ms:.0f} ms")
    return 0 if exit_reason == KVM_EXIT_HLT else 1


if __name__ == "__main__":
    sys.exit(main())
