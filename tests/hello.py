import os
print("kernel ", os.uname().release)
for name in ("memory.max", "cpu.max", "pids.max"):
    print(f"{name:7}", open(f"/sys/fs/cgroup/{name}").read().strip())
print("uid map", open("/proc/self/uid_map").read().strip())
print("sum    ", sum(n * n for n in range(1000)))
