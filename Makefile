# The one door to the project: `make run`, `make test`, `make bench`. Each target installs what it needs.
target := $(or $(CARGO_TARGET_DIR),$(CURDIR)/target)
release := $(target)/release
static := $(target)/static/x86_64-unknown-linux-gnu
static_env := RUSTFLAGS="-C target-feature=+crt-static" LIBSECCOMP_LINK_TYPE=static LIBSECCOMP_LIB_PATH=/usr/lib/x86_64-linux-gnu LIBCAPNG_LINK_TYPE=static LIBCAPNG_LIB_PATH=/usr/lib/x86_64-linux-gnu

# A guest without an operating system, so not of the workspace.
hostile = cd tests/hostile && CARGO_TARGET_DIR=$(target)/hostile cargo

.PHONY: build run test bench fuzz lint clean

# vmrun and the shim, with the three files that they look for beside themselves.
build: packages
	$(MAKE) --jobs=3 programs guest-kernel

# Side by side: the last steps of each keep one CPU busy for minutes.
.PHONY: programs dynamic-programs static-programs test-programs unfiltered-vmm guest-kernel
programs: dynamic-programs static-programs
	install -m 755 $(static)/release/vmm $(release)/vmm
	$(release)/rootfs --agent $(static)/guest/agent --output $(release)/rootfs.erofs
dynamic-programs:
	cargo build --release -p vmrun -p containerd-shim-vm-v2 -p rootfs
static-programs:
	$(static_env) cargo build --release -p vmm --target x86_64-unknown-linux-gnu --target-dir $(target)/static
	$(static_env) cargo rustc --profile guest -p agent --target x86_64-unknown-linux-gnu --target-dir $(target)/static \
	  -- -C link-arg=-Wl,-z,pack-relative-relocs
guest-kernel:
	mkdir -p $(release)
	ln -sf "$$(guest-kernel/build)" $(release)/vmlinux
test-programs:
	tests/run --build
unfiltered-vmm: static-programs
	$(static_env) cargo build --release -p unfiltered --target x86_64-unknown-linux-gnu --target-dir $(target)/static

# A Debian container with Python in a microVM.
run: build
	image=$$(tests/debian-image) && tests/on-kvm $(release)/vmrun run --rm --timing --memory 256m "oci:$$image" \
	  python3 -c "$$(cat tests/hello.py)"

# Unit tests here, stories on KVM. Clippy of the workspace is part of `tests/run`.
test: packages lint-rest
	$(MAKE) --jobs=3 programs guest-kernel test-programs unfiltered-vmm
	$(hostile) build --release
	@tests/install-packages docker-registry skopeo containernetworking-plugins iproute2 iptables passt curl iperf3 \
	  e2fsprogs mount strace
	tests/debian-image >/dev/null
	tests/containerd-packages >/dev/null
	tests/run

# Counts and ratios, explained in tests/bench/README.md.
bench: build unfiltered-vmm
	tests/bench/kernel-boot
	tests/bench/instructions
	tests/bench/start
	tests/bench/network
	tests/bench/files
	tests/bench/vsock
	tests/bench/figures

# Each target for so many seconds of one processor, see tests/fuzz/README.md.
fuzz: SECONDS ?= 60
fuzz:
	tests/fuzz/run $(SECONDS)

lint: lint-rest
	cargo clippy --workspace --all-targets -- -D warnings

.PHONY: lint-rest
lint-rest:
	cargo fmt --check
	cd tests/fuzz && cargo fmt --check
	cd tests/hostile && cargo fmt --check
	$(hostile) clippy --release -- -D warnings

.PHONY: packages
packages:
	@tests/install-packages libcap-ng-dev libseccomp-dev busybox-static protobuf-compiler erofs-utils

clean:
	tests/on-kvm --stop
	cargo clean
