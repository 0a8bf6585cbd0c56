//! Arguments of the requests, bit for bit. Fields that start with `_pad` are the
//! padding C would have hidden; they are zero. User addresses are `u64`.
//!
//! Sizes and offsets are what a C compiler gives for FreeBSD/amd64 (LP64) and
//! are asserted when this file is compiled.

use crate::limits::{
    MAX_VM_STATS, MEMSEG_NAME_12, STAT_DESC_LEN, VM_MAX_NAMELEN, VM_MAX_SUFFIXLEN,
};
use crate::raw_exit::VmExitRaw;
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

macro_rules! abi_struct {
    ($(#[$m:meta])* $name:ident, $size:literal { $($(#[$fm:meta])* $f:ident: $t:ty = $off:literal,)* }) => {
        $(#[$m])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
        #[repr(C)]
        pub struct $name {
            $($(#[$fm])* pub $f: $t,)*
        }

        impl Default for $name {
            fn default() -> Self {
                Self::new_zeroed()
            }
        }

        const _: () = {
            assert!(size_of::<$name>() == $size);
            $(assert!(core::mem::offset_of!($name, $f) == $off);)*
        };
    };
}
pub(crate) use abi_struct;

abi_struct! {
    /// A segment descriptor (`struct seg_desc`); `access` as VMX encodes it (SDM Vol. 3C §24.4.1, table 24-2), bit 16 = unusable.
    SegDesc, 16 {
        /// Linear base.
        base: u64 = 0,
        /// Limit in bytes.
        limit: u32 = 8,
        /// Access rights.
        access: u32 = 12,
    }
}

abi_struct! {
    /// Paging state of a vCPU (`struct vm_guest_paging`).
    GuestPaging, 24 {
        /// CR3.
        cr3: u64 = 0,
        /// Current privilege level.
        cpl: i32 = 8,
        /// [`CpuMode`](crate::CpuMode).
        cpu_mode: u32 = 12,
        /// [`PagingMode`](crate::PagingMode).
        paging_mode: u32 = 16,
        /// Zero.
        _pad0: u32 = 20,
    }
}

abi_struct! {
    /// `struct timeval`, 64-bit.
    Timeval, 16 {
        /// Seconds.
        tv_sec: i64 = 0,
        /// Microseconds.
        tv_usec: i64 = 8,
    }
}

abi_struct! {
    /// A mapping of a memory segment into guest-physical memory (`struct vm_memmap`).
    VmMemmap, 40 {
        /// Guest-physical address, bytes, page-aligned.
        gpa: u64 = 0,
        /// Memory segment.
        segid: i32 = 8,
        /// Zero.
        _pad0: u32 = 12,
        /// Offset into the segment, bytes, page-aligned.
        segoff: i64 = 16,
        /// Length, bytes, page-aligned.
        len: u64 = 24,
        /// `PROT_*`.
        prot: i32 = 32,
        /// `VM_MEMMAP_F_*`.
        flags: i32 = 36,
    }
}

abi_struct! {
    /// A memory segment as 12.1 describes it (`struct vm_memseg`, 80 bytes).
    VmMemseg, 80 {
        /// Memory segment.
        segid: i32 = 0,
        /// Zero.
        _pad0: u32 = 4,
        /// Length, bytes; 0 = no such segment.
        len: u64 = 8,
        /// NUL-terminated name of device memory; empty for system memory.
        name: [u8; MEMSEG_NAME_12] = 16,
    }
}

abi_struct! {
    /// A register (`struct vm_register`).
    VmRegister, 16 {
        /// vCPU.
        cpuid: i32 = 0,
        /// [`RegName`](crate::RegName).
        regnum: i32 = 4,
        /// Value.
        regval: u64 = 8,
    }
}

abi_struct! {
    /// A segment descriptor of a vCPU (`struct vm_seg_desc`).
    VmSegDesc, 24 {
        /// vCPU.
        cpuid: i32 = 0,
        /// [`RegName`](crate::RegName).
        regnum: i32 = 4,
        /// Descriptor.
        desc: SegDesc = 8,
    }
}

abi_struct! {
    /// Several registers at once (`struct vm_register_set`).
    VmRegisterSet, 24 {
        /// vCPU.
        cpuid: i32 = 0,
        /// Entries of both arrays.
        count: u32 = 4,
        /// User address of `count` register numbers, `int`.
        regnums: u64 = 8,
        /// User address of `count` values, `uint64_t`.
        regvals: u64 = 16,
    }
}

abi_struct! {
    /// Argument of `VM_RUN` in 12 and 13 (`struct vm_run`).
    VmRun, 144 {
        /// vCPU.
        cpuid: i32 = 0,
        /// Zero.
        _pad0: u32 = 4,
        /// Filled in by the kernel.
        vm_exit: VmExitRaw = 8,
    }
}

abi_struct! {
    /// An exception to inject (`struct vm_exception`).
    VmException, 20 {
        /// vCPU.
        cpuid: i32 = 0,
        /// 0 to 31.
        vector: i32 = 4,
        /// Error code.
        error_code: u32 = 8,
        /// Whether the error code is pushed.
        error_code_valid: i32 = 12,
        /// Whether RIP stays at the instruction (a fault).
        restart_instruction: i32 = 16,
    }
}

abi_struct! {
    /// A message-signalled interrupt (`struct vm_lapic_msi`; SDM Vol. 3A §10.11).
    VmLapicMsi, 16 {
        /// Data.
        msg: u64 = 0,
        /// Address.
        addr: u64 = 8,
    }
}

abi_struct! {
    /// An interrupt to a local APIC (`struct vm_lapic_irq`).
    VmLapicIrq, 8 {
        /// vCPU; -1 = all, where a local interrupt is meant.
        cpuid: i32 = 0,
        /// Vector, or LVT entry for a local interrupt.
        vector: i32 = 4,
    }
}

abi_struct! {
    /// A pin of the IOAPIC (`struct vm_ioapic_irq`).
    VmIoapicIrq, 4 {
        /// Pin.
        irq: i32 = 0,
    }
}

abi_struct! {
    /// An ISA interrupt (`struct vm_isa_irq`).
    VmIsaIrq, 8 {
        /// Line of the 8259 pair.
        atpic_irq: i32 = 0,
        /// Pin of the IOAPIC; -1 = none.
        ioapic_irq: i32 = 4,
    }
}

abi_struct! {
    /// Trigger mode of an ISA interrupt (`struct vm_isa_irq_trigger`).
    VmIsaIrqTrigger, 8 {
        /// Line of the 8259 pair.
        atpic_irq: i32 = 0,
        /// [`IntrTrigger`](crate::IntrTrigger).
        trigger: u32 = 4,
    }
}

abi_struct! {
    /// A capability of a vCPU (`struct vm_capability`).
    VmCapability, 16 {
        /// vCPU.
        cpuid: i32 = 0,
        /// [`Capability`](crate::Capability).
        captype: u32 = 4,
        /// Value.
        capval: i32 = 8,
        /// Unused.
        allcpus: i32 = 12,
    }
}

abi_struct! {
    /// A host PCI function for passthrough (`struct vm_pptdev`).
    VmPptdev, 12 {
        /// Bus.
        bus: i32 = 0,
        /// Device.
        slot: i32 = 4,
        /// Function.
        func: i32 = 8,
    }
}

abi_struct! {
    /// A BAR of a passed-through function (`struct vm_pptdev_mmio`).
    VmPptdevMmio, 40 {
        /// Bus.
        bus: i32 = 0,
        /// Device.
        slot: i32 = 4,
        /// Function.
        func: i32 = 8,
        /// Zero.
        _pad0: u32 = 12,
        /// Guest-physical address.
        gpa: u64 = 16,
        /// Host-physical address.
        hpa: u64 = 24,
        /// Length, bytes.
        len: u64 = 32,
    }
}

abi_struct! {
    /// MSI of a passed-through function (`struct vm_pptdev_msi`).
    VmPptdevMsi, 40 {
        /// Unused.
        vcpu: i32 = 0,
        /// Bus.
        bus: i32 = 4,
        /// Device.
        slot: i32 = 8,
        /// Function.
        func: i32 = 12,
        /// Vectors; 0 = disabled.
        numvec: i32 = 16,
        /// Zero.
        _pad0: u32 = 20,
        /// Data.
        msg: u64 = 24,
        /// Address.
        addr: u64 = 32,
    }
}

abi_struct! {
    /// One MSI-X vector of a passed-through function (`struct vm_pptdev_msix`).
    VmPptdevMsix, 48 {
        /// Unused.
        vcpu: i32 = 0,
        /// Bus.
        bus: i32 = 4,
        /// Device.
        slot: i32 = 8,
        /// Function.
        func: i32 = 12,
        /// Entry of the table.
        idx: i32 = 16,
        /// Zero.
        _pad0: u32 = 20,
        /// Data.
        msg: u64 = 24,
        /// Vector control.
        vector_control: u32 = 32,
        /// Zero.
        _pad1: u32 = 36,
        /// Address.
        addr: u64 = 40,
    }
}

abi_struct! {
    /// An NMI to inject (`struct vm_nmi`).
    VmNmi, 4 {
        /// vCPU.
        cpuid: i32 = 0,
    }
}

abi_struct! {
    /// Statistics of a vCPU in 12 and 13 (`struct vm_stats`).
    VmStats, 536 {
        /// vCPU.
        cpuid: i32 = 0,
        /// Valid entries, out.
        num_entries: i32 = 4,
        /// When.
        tv: Timeval = 8,
        /// Values.
        statbuf: [u64; MAX_VM_STATS] = 24,
    }
}

abi_struct! {
    /// What a statistic counts (`struct vm_stat_desc`).
    VmStatDesc, 132 {
        /// Index, in.
        index: i32 = 0,
        /// NUL-terminated text, out.
        desc: [u8; STAT_DESC_LEN] = 4,
    }
}

abi_struct! {
    /// x2APIC state of a vCPU (`struct vm_x2apic`).
    VmX2apic, 8 {
        /// vCPU.
        cpuid: i32 = 0,
        /// [`X2apicState`](crate::X2apicState).
        state: u32 = 4,
    }
}

abi_struct! {
    /// Nested page-table entries of a page (`struct vm_gpa_pte`).
    VmGpaPte, 48 {
        /// Guest-physical address, in.
        gpa: u64 = 0,
        /// Entries from the top level down, out.
        pte: [u64; 4] = 8,
        /// Valid entries, out.
        ptenum: i32 = 40,
        /// Zero.
        _pad0: u32 = 44,
    }
}

abi_struct! {
    /// Capabilities of the HPET (`struct vm_hpet_cap`).
    VmHpetCap, 4 {
        /// Low half of the capabilities register.
        capabilities: u32 = 0,
    }
}

abi_struct! {
    /// How to stop the VM (`struct vm_suspend`).
    VmSuspend, 4 {
        /// [`SuspendHow`](crate::SuspendHow).
        how: u32 = 0,
    }
}

abi_struct! {
    /// A translation of a linear address (`struct vm_gla2gpa`).
    VmGla2gpa, 56 {
        /// vCPU.
        vcpuid: i32 = 0,
        /// `PROT_READ` or `PROT_WRITE`.
        prot: i32 = 4,
        /// Guest-linear address.
        gla: u64 = 8,
        /// Paging state to use.
        paging: GuestPaging = 16,
        /// Whether it faulted, out.
        fault: i32 = 40,
        /// Zero.
        _pad0: u32 = 44,
        /// Guest-physical address, out.
        gpa: u64 = 48,
    }
}

abi_struct! {
    /// A vCPU to activate, suspend or resume (`struct vm_activate_cpu`).
    VmActivateCpu, 4 {
        /// vCPU; -1 = all, for suspend and resume.
        vcpuid: i32 = 0,
    }
}

abi_struct! {
    /// A set of vCPUs (`struct vm_cpuset`).
    VmCpuset, 16 {
        /// [`CpusetWhich`](crate::CpusetWhich).
        which: i32 = 0,
        /// Bytes at `cpus`.
        cpusetsize: i32 = 4,
        /// User address of a bit set, least significant bit = vCPU 0.
        cpus: u64 = 8,
    }
}

abi_struct! {
    /// Pending events of a vCPU (`struct vm_intinfo`).
    VmIntinfo, 24 {
        /// vCPU.
        vcpuid: i32 = 0,
        /// Zero.
        _pad0: u32 = 4,
        /// Interrupted delivery, `VM_INTINFO_*`.
        info1: u64 = 8,
        /// Exception to inject, `VM_INTINFO_*`.
        info2: u64 = 16,
    }
}

abi_struct! {
    /// Time of the RTC (`struct vm_rtc_time`).
    VmRtcTime, 8 {
        /// Seconds since the epoch.
        secs: i64 = 0,
    }
}

abi_struct! {
    /// A byte of the RTC's memory (`struct vm_rtc_data`).
    VmRtcData, 8 {
        /// Offset.
        offset: i32 = 0,
        /// Value.
        value: u8 = 4,
        /// Zero.
        _pad0: [u8; 3] = 5,
    }
}

abi_struct! {
    /// Topology of the vCPUs (`struct vm_cpu_topology`).
    VmCpuTopology, 8 {
        /// Sockets.
        sockets: u16 = 0,
        /// Cores a socket.
        cores: u16 = 2,
        /// Threads a core.
        threads: u16 = 4,
        /// Most vCPUs; 0 where it is not set.
        maxcpus: u16 = 6,
    }
}

// What 13, 14 and 15 added or changed.

abi_struct! {
    /// A range of guest memory to unmap (13, `struct vm_munmap`).
    VmMunmap, 16 {
        /// Guest-physical address.
        gpa: u64 = 0,
        /// Length, bytes.
        len: u64 = 8,
    }
}

abi_struct! {
    /// A memory segment as 13 and 14 describe it, with a shorter name.
    VmMemseg13, 32 {
        /// Memory segment.
        segid: i32 = 0,
        /// Zero.
        _pad0: u32 = 4,
        /// Length, bytes; 0 = no such segment.
        len: u64 = 8,
        /// NUL-terminated name of device memory; empty for system memory.
        name: [u8; VM_MAX_SUFFIXLEN + 1] = 16,
    }
}

abi_struct! {
    /// A memory segment as 15 describes it, with a memory-domain policy.
    VmMemseg15, 56 {
        /// Memory segment.
        segid: i32 = 0,
        /// Zero.
        _pad0: u32 = 4,
        /// Length, bytes; 0 = no such segment.
        len: u64 = 8,
        /// NUL-terminated name of device memory; empty for system memory.
        name: [u8; VM_MAX_SUFFIXLEN + 1] = 16,
        /// User address of a set of memory domains; 0 = none.
        ds_mask: u64 = 32,
        /// Bytes at `ds_mask`.
        ds_mask_size: u64 = 40,
        /// Policy.
        ds_policy: i32 = 48,
        /// Zero.
        _pad1: u32 = 52,
    }
}

abi_struct! {
    /// Argument of `VM_RUN` from 14 on: points to what the kernel fills in.
    VmRun14, 32 {
        /// vCPU.
        cpuid: i32 = 0,
        /// Zero.
        _pad0: u32 = 4,
        /// User address of a CPU set, for `ExitCode::Ipi`; may be 0.
        cpuset: u64 = 8,
        /// Bytes at `cpuset`.
        cpusetsize: u64 = 16,
        /// User address of a `struct vm_exit`.
        vm_exit: u64 = 24,
    }
}

abi_struct! {
    /// Statistics of a vCPU from 14 on, a page at a time.
    VmStats14, 544 {
        /// vCPU.
        cpuid: i32 = 0,
        /// First statistic wanted.
        index: i32 = 4,
        /// Valid entries, out.
        num_entries: i32 = 8,
        /// Zero.
        _pad0: u32 = 12,
        /// When.
        tv: Timeval = 16,
        /// Values.
        statbuf: [u64; MAX_VM_STATS] = 32,
    }
}

abi_struct! {
    /// An access to a device that the kernel emulates (13, `struct vm_readwrite_kernemu_device`).
    VmKernemuDev, 24 {
        /// vCPU.
        vcpuid: i32 = 0,
        /// Bits 2..0: log2 of the width in bytes; the rest is zero.
        access_width: u32 = 4,
        /// Guest-physical address.
        gpa: u64 = 8,
        /// Value.
        value: u64 = 16,
    }
}

abi_struct! {
    /// A request to save or restore kernel state (13, `struct vm_snapshot_meta`).
    VmSnapshotMeta13, 72 {
        /// Unused.
        ctx: u64 = 0,
        /// Unused by the kernel.
        dev_data: u64 = 8,
        /// Unused by the kernel.
        dev_name: u64 = 16,
        /// What to save.
        dev_req: u32 = 24,
        /// Zero.
        _pad0: u32 = 28,
        /// User address of the buffer.
        buf_start: u64 = 32,
        /// Its length, bytes.
        buf_size: u64 = 40,
        /// Current position.
        buf: u64 = 48,
        /// Bytes left.
        buf_rem: u64 = 56,
        /// 0 save, 1 restore.
        op: u32 = 64,
        /// Zero.
        _pad1: u32 = 68,
    }
}

abi_struct! {
    /// The same from 14 on.
    VmSnapshotMeta14, 64 {
        /// Unused by the kernel.
        dev_data: u64 = 0,
        /// Unused by the kernel.
        dev_name: u64 = 8,
        /// What to save.
        dev_req: u32 = 16,
        /// Zero.
        _pad0: u32 = 20,
        /// User address of the buffer.
        buf_start: u64 = 24,
        /// Its length, bytes.
        buf_size: u64 = 32,
        /// Current position.
        buf: u64 = 40,
        /// Bytes left.
        buf_rem: u64 = 48,
        /// 0 save, 1 restore.
        op: u32 = 56,
        /// Zero.
        _pad1: u32 = 60,
    }
}

abi_struct! {
    /// Argument of `VMMCTL_VM_CREATE` and `VMMCTL_VM_DESTROY` (15, `struct vmmctl_vm_create`).
    VmmctlVm, 296 {
        /// NUL-terminated name of the VM.
        name: [u8; VM_MAX_NAMELEN + 1] = 0,
        /// Zero.
        _pad0: [u8; 2] = 230,
        /// Zero.
        reserved: [i32; 16] = 232,
    }
}

// Ours.

abi_struct! {
    /// Answer of `VM_EXT_VERSION`: what this kernel piece has beyond FreeBSD's interface.
    VmExtVersion, 8 {
        /// [`EXT_ABI_VERSION`].
        abi_version: u32 = 0,
        /// `EXT_F_*`.
        features: u32 = 4,
    }
}

abi_struct! {
    /// Argument of `VM_EXT_RUN`: as [`VmRun`], and RAX for the IN that the
    /// last exit was.
    VmExtRun, 152 {
        /// vCPU.
        cpuid: i32 = 0,
        /// `EXT_RUN_*`.
        flags: u32 = 4,
        /// RAX, with [`EXT_RUN_RAX`].
        rax: u64 = 8,
        /// Filled in by the kernel.
        vm_exit: VmExitRaw = 16,
    }
}

abi_struct! {
    /// Argument of `VM_EXT_CONSTANT_PORT`: what a one-byte IN from a port
    /// answers, without an exit to userland, until told otherwise.
    VmExtConstantPort, 8 {
        /// Port.
        port: u16 = 0,
        /// 1: answer with `value`; 0: ask userland again.
        on: u16 = 2,
        /// The byte.
        value: u32 = 4,
    }
}

abi_struct! {
    /// What a vCPU's run page holds (`VM_EXT_RUN_PAGE`); the rest of the page
    /// is zero.
    VmExtRunPage, 432 {
        /// The last exit, filled in by the kernel. Bytes of the union that the
        /// exit's kind does not have are left over from exits before.
        vm_exit: VmExitRaw = 0,
        /// RAX, with [`EXT_RUN_RAX`]: filled in by userland.
        rax: u64 = 136,
        /// With [`EXT_RUN_MSI`], how many of `msi` are to be sent.
        msis: u64 = 144,
        /// Messages, address and data each: filled in by userland.
        msi: [[u64; 2]; EXT_RUN_MSIS] = 152,
        /// After an `InstEmul` exit the general registers, by their numbers in
        /// instructions (SDM Vol. 2A §2.1.5), filled in by the kernel; before a run
        /// with [`EXT_RUN_GPRS`] what userland wants them to be.
        gprs: [u64; EXT_RUN_GPR_COUNT] = 280,
        /// RFLAGS, as `gprs`.
        rflags: u64 = 408,
        /// IA32_EFER, filled in by the kernel.
        efer: u64 = 416,
        /// With [`EXT_RUN_GPRS`], what is to be set: bit n is `gprs[n]`, bit 16
        /// `rflags`. Filled in by userland.
        changed: u64 = 424,
    }
}

abi_struct! {
    /// Argument of `VM_EXT_RELEASE`: the host memory behind a range of system
    /// memory is given back; what is touched later is new, and zero.
    VmExtRelease, 24 {
        /// First guest-physical address, a multiple of 4 KiB.
        gpa: u64 = 0,
        /// Bytes, a multiple of 4 KiB. Where the host has memory in larger
        /// pieces, only those go that lie in the range as a whole.
        len: u64 = 8,
        /// Bytes that went; filled in by the kernel.
        released: u64 = 16,
    }
}

abi_struct! {
    /// Argument of `VM_EXT_PV`: what of the paravirtual interface that KVM's
    /// guests know a guest sees. A VM begins with all that there is, and with the
    /// host's TSC.
    VmExtPv, 8 {
        /// Features as KVM's CPUID leaf has them (EAX of 4000_0001H there);
        /// those that the kernel piece does not have are ignored.
        features: u32 = 0,
        /// With [`EXT_F_TSC`], the guest's TSC frequency, kHz; 0: the host's.
        /// EOPNOTSUPP: the CPU cannot make that of the host's. EBUSY: vCPUs are
        /// active, and it would change.
        tsc_khz: u32 = 4,
    }
}

/// Offset in a VM's device at which the run page of vCPU 0 can be mapped; one
/// page a vCPU. Beyond the guest-physical addresses that exist (52 bits).
pub const EXT_RUN_PAGES: u64 = 1 << 52;
/// Flags of `VM_EXT_RUN_PAGE` start at this bit, above the vCPU's number.
pub const EXT_RUN_SHIFT: u32 = 24;

abi_struct! {
    /// Argument of `VM_EXT_OUT_RING`: where one-byte OUTs to a port go.
    VmExtOutRing, 8 {
        /// Port.
        port: u16 = 0,
        /// 1: into the ring, emptied and closed by this; 0: to userland.
        on: u16 = 2,
        /// Which ring, below [`EXT_OUT_RING_COUNT`].
        ring: u32 = 4,
    }
}

abi_struct! {
    /// Argument of `VM_EXT_DOORBELL`: an OUT of two bytes that only rings.
    VmExtDoorbell, 16 {
        /// Port.
        port: u16 = 0,
        /// The value that rings, with [`DOORBELL_VALUE`].
        value: u16 = 2,
        /// `DOORBELL_*`.
        flags: u32 = 4,
        /// With [`DOORBELL_ON`], what is signalled: an eventfd; on FreeBSD the event
        /// EVFILT_USER [`DOORBELL_IDENT`] of this kqueue, as long as the process that set it runs the
        /// vCPU.
        fd: i32 = 8,
        /// Zero.
        _pad0: u32 = 12,
    }
}

/// On FreeBSD the identifier of the event in the kqueue; one that no other kqueue has,
/// should the descriptor become another's.
pub const DOORBELL_IDENT: usize = 0x7669_7274;
/// `VmExtDoorbell::flags`: from now on; without it, no more.
pub const DOORBELL_ON: u32 = 1;
/// `VmExtDoorbell::flags`: only OUTs of `value` ring.
pub const DOORBELL_VALUE: u32 = 2;

/// Offset in a VM's device at which ring 0 of `VM_EXT_OUT_RING` can be mapped,
/// a page each, once the ring is in use.
pub const EXT_OUT_RINGS: u64 = EXT_RUN_PAGES + (1 << 40);
/// Rings a VM has.
pub const EXT_OUT_RING_COUNT: usize = 4;
/// Offset in a ring's page: bytes put in so far, modulo 2^32 (u32, the kernel's).
pub const OUT_RING_HEAD: usize = 0;
/// Bytes taken out so far, modulo 2^32 (u32, userland's).
pub const OUT_RING_TAIL: usize = 64;
/// Not 0: the ring takes bytes (u32, userland's). A byte that was on its way
/// when it closed may still arrive, some microseconds later.
pub const OUT_RING_OPEN: usize = 128;
/// The bytes; the n-th is at n modulo [`OUT_RING_LEN`].
pub const OUT_RING_DATA: usize = 2048;
/// Bytes a ring holds, a power of two.
pub const OUT_RING_LEN: usize = 2048;

/// `VmExtVersion::features`: `VM_EXT_RUN` is there.
pub const EXT_F_RUN: u32 = 1;
/// `VmExtVersion::features`: `VM_EXT_CONSTANT_PORT` is there.
pub const EXT_F_CONSTANT_PORT: u32 = 2;
/// `VmExtVersion::features`: `VM_EXT_RUN_PAGE` is there.
pub const EXT_F_RUN_PAGE: u32 = 4;
/// `VmExtVersion::features`: `VM_EXT_OUT_RING` is there.
pub const EXT_F_OUT_RING: u32 = 8;
/// `VmExtVersion::features`: `VM_EXT_DOORBELL` is there.
pub const EXT_F_DOORBELL: u32 = 16;
/// `VmExtVersion::features`: lseek(2) with SEEK_DATA from a run page's place does
/// what `VM_EXT_RUN_PAGE` does: goes on to the vCPU's next exit. The flags
/// (`EXT_RUN_*`) are the offset in the page; the result is 0. For hosts where that
/// system call costs less than ioctl(2).
pub const EXT_F_RUN_SEEK: u32 = 32;
/// `VmExtVersion::features`: an `InstEmul` exit leaves registers in the run page, and
/// [`EXT_RUN_GPRS`] sets them.
pub const EXT_F_RUN_GPRS: u32 = 64;
/// `VmExtVersion::features`: `VM_EXT_RELEASE` is there.
pub const EXT_F_RELEASE: u32 = 0x100;
/// `VmExtVersion::features`: `VM_EXT_PV` sets the guest's TSC frequency.
pub const EXT_F_TSC: u32 = 0x200;
/// `VmExtVersion::features`: the paravirtual interface and `VM_EXT_PV` are there.
pub const EXT_F_PV: u32 = 0x1000;
/// `VmExtRun::flags`: set RAX before the guest goes on.
pub const EXT_RUN_RAX: u32 = 1;
/// `VM_EXT_RUN_PAGE`: send the run page's messages first.
pub const EXT_RUN_MSI: u32 = 2;
/// `VM_EXT_RUN_PAGE`: set the registers that the run page's `changed` names.
pub const EXT_RUN_GPRS: u32 = 4;
/// General registers of a run page.
pub const EXT_RUN_GPR_COUNT: usize = 16;
/// `VmExtRunPage::changed`: RFLAGS.
pub const EXT_RUN_CHANGED_RFLAGS: u64 = 1 << 16;
/// Messages that a run page holds.
pub const EXT_RUN_MSIS: usize = 8;

/// Version of our extension range; changes when a request of it changes.
pub const EXT_ABI_VERSION: u32 = 1;

/// Bytes up to the first NUL; `None` when there is none, so an unterminated
/// name from outside is refused.
pub fn c_name(field: &[u8]) -> Option<&[u8]> {
    let len = field.iter().position(|&b| b == 0)?;
    field.get(..len)
}

/// Puts `name` and a NUL into a zeroed field; false if it does not fit or
/// contains a NUL.
#[must_use]
pub fn set_c_name(field: &mut [u8], name: &[u8]) -> bool {
    if name.len() >= field.len() || name.contains(&0) {
        return false;
    }
    field.fill(0);
    for (dst, src) in field.iter_mut().zip(name) {
        *dst = *src;
    }
    true
}
