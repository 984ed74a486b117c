//! Kinds of threads, each with a filter of its own.

/// Stands for our process id in a program, and is none.
pub(super) const OWN_PROCESS: u32 = u32::MAX;

/// What a thread is for.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum ThreadKind {
    /// The main thread, once the VM is built.
    EventLoop,
    /// `vcpuN`.
    Vcpu,
    /// `devices`: starts and resets devices.
    Devices,
    /// `fsN`.
    Fs,
    /// `netN`.
    Net,
    /// `vsock-finish`.
    VsockFinish,
}

impl ThreadKind {
    /// Each kind.
    pub const ALL: [Self; 6] = [Self::EventLoop, Self::Vcpu, Self::Devices, Self::Fs, Self::Net, Self::VsockFinish];
}
