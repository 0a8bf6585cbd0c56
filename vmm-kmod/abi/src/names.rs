//! The interface's enumerations. In structures they are integers; here they
//! become Rust enums, fallibly, because the other side may say anything.

/// A number that the enumeration does not have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnknownValue(
    /// The number.
    pub i64,
);

macro_rules! c_enum {
    ($(#[$m:meta])* $name:ident { $($(#[$vm:meta])* $v:ident = $n:literal,)* }) => {
        $(#[$m])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[repr(u32)]
        pub enum $name {
            $($(#[$vm])* $v = $n,)*
        }

        impl $name {
            /// Every value, in numeric order.
            pub const ALL: &'static [$name] = &[$($name::$v,)*];
            /// The number in the interface.
            pub const fn raw(self) -> u32 {
                self as u32
            }
            /// The value with this number.
            pub const fn from_raw(raw: u32) -> Option<Self> {
                match raw {
                    $($n => Some($name::$v),)*
                    _ => None,
                }
            }
        }

        impl TryFrom<u32> for $name {
            type Error = UnknownValue;
            fn try_from(raw: u32) -> Result<Self, UnknownValue> {
                Self::from_raw(raw).ok_or(UnknownValue(i64::from(raw)))
            }
        }

        impl TryFrom<i32> for $name {
            type Error = UnknownValue;
            fn try_from(raw: i32) -> Result<Self, UnknownValue> {
                u32::try_from(raw)
                    .ok()
                    .and_then(Self::from_raw)
                    .ok_or(UnknownValue(i64::from(raw)))
            }
        }
    };
}

c_enum! {
    /// How a VM stops (`enum vm_suspend_how`).
    SuspendHow {
        /// It does not.
        None = 0,
        /// Reset.
        Reset = 1,
        /// Power off.
        Poweroff = 2,
        /// Every vCPU halted with interrupts off.
        Halt = 3,
        /// Triple fault.
        TripleFault = 4,
        /// Destroyed (from FreeBSD 14.2 on).
        Destroy = 5,
    }
}

c_enum! {
    /// Registers of a vCPU (`enum vm_reg_name`). 12.1 ends at `Dr6`; 13 added
    /// `EntryInstLength`, 14 the rest.
    #[allow(missing_docs)]
    RegName {
        Rax = 0, Rbx = 1, Rcx = 2, Rdx = 3, Rsi = 4, Rdi = 5, Rbp = 6, R8 = 7,
        R9 = 8, R10 = 9, R11 = 10, R12 = 11, R13 = 12, R14 = 13, R15 = 14,
        Cr0 = 15, Cr3 = 16, Cr4 = 17, Dr7 = 18, Rsp = 19, Rip = 20, Rflags = 21,
        Es = 22, Cs = 23, Ss = 24, Ds = 25, Fs = 26, Gs = 27, Ldtr = 28, Tr = 29,
        Idtr = 30, Gdtr = 31, Efer = 32, Cr2 = 33, Pdpte0 = 34, Pdpte1 = 35,
        Pdpte2 = 36, Pdpte3 = 37, IntrShadow = 38, Dr0 = 39, Dr1 = 40, Dr2 = 41,
        Dr3 = 42, Dr6 = 43,
        EntryInstLength = 44,
        FsBase = 45, GsBase = 46, KgsBase = 47, Tpr = 48,
    }
}

/// `VM_REG_LAST` of 12.1: the first number that its register list lacks.
pub const VM_REG_LAST_12: u32 = 44;

c_enum! {
    /// State of a local APIC (`enum x2apic_state`).
    X2apicState {
        /// The guest cannot switch to x2APIC mode.
        Disabled = 0,
        /// The guest may switch to x2APIC mode.
        Enabled = 1,
    }
}

c_enum! {
    /// Optional capabilities of a vCPU (`enum vm_cap_type`). 12.1 ends at
    /// `EnableInvpcid`.
    Capability {
        /// HLT exits to userland.
        HaltExit = 0,
        /// Exit after every instruction.
        MtrapExit = 1,
        /// PAUSE exits to userland.
        PauseExit = 2,
        /// Real mode without emulation.
        UnrestrictedGuest = 3,
        /// INVPCID is available to the guest.
        EnableInvpcid = 4,
        /// #BP exits to userland (13).
        BptExit = 5,
        /// RDPID is available (13).
        Rdpid = 6,
        /// RDTSCP is available (13).
        Rdtscp = 7,
        /// Start-up IPIs exit to userland (14).
        IpiExit = 8,
        /// Interrupts are held back (14).
        MaskHwintr = 9,
        /// Single step with RFLAGS.TF (14).
        RflagsTf = 10,
    }
}

c_enum! {
    /// Trigger mode of an interrupt line (`enum vm_intr_trigger`).
    IntrTrigger {
        /// Edge.
        Edge = 0,
        /// Level.
        Level = 1,
    }
}

c_enum! {
    /// Operating mode of a vCPU (`enum vm_cpu_mode`).
    CpuMode {
        /// Real mode.
        Real = 0,
        /// Protected mode.
        Protected = 1,
        /// Long mode, 16- or 32-bit code.
        Compatibility = 2,
        /// Long mode, 64-bit code.
        Bits64 = 3,
    }
}

c_enum! {
    /// Paging mode of a vCPU (`enum vm_paging_mode`).
    PagingMode {
        /// No paging.
        Flat = 0,
        /// Two levels.
        Bits32 = 1,
        /// Three levels.
        Pae = 2,
        /// Four levels.
        Bits64 = 3,
        /// Five levels (13).
        Bits64La57 = 4,
    }
}

c_enum! {
    /// Why `VM_RUN` returned (`enum vm_exitcode`). 12.1 ends at `Vminsn`.
    ExitCode {
        /// IN or OUT.
        Inout = 0,
        /// A VT-x exit without a better code.
        Vmx = 1,
        /// Nothing to do: run again.
        Bogus = 2,
        /// RDMSR of an MSR that the kernel does not have.
        Rdmsr = 3,
        /// WRMSR of such an MSR.
        Wrmsr = 4,
        /// HLT.
        Hlt = 5,
        /// One instruction was executed.
        Mtrap = 6,
        /// PAUSE.
        Pause = 7,
        /// A guest-physical page fault that the kernel cannot resolve.
        Paging = 8,
        /// An instruction touched memory that somebody emulates.
        InstEmul = 9,
        /// A start-up IPI for another vCPU.
        SpinupAp = 10,
        /// Once "spin down CPU".
        Deprecated1 = 11,
        /// All vCPUs are to meet (kernel only).
        Rendezvous = 12,
        /// EOI of a level-triggered vector (kernel only).
        IoapicEoi = 13,
        /// The VM is stopping.
        Suspended = 14,
        /// INS or OUTS.
        InoutStr = 15,
        /// A hardware task switch.
        TaskSwitch = 16,
        /// MONITOR.
        Monitor = 17,
        /// MWAIT.
        Mwait = 18,
        /// An AMD-V exit without a better code.
        Svm = 19,
        /// vCPUs are asked to be idle for a moment.
        Reqidle = 20,
        /// The vCPU is stopped by a debugger.
        Debug = 21,
        /// A virtualization instruction.
        Vminsn = 22,
        /// #BP (13).
        Bpt = 23,
        /// An inter-processor interrupt that userland emulates (14).
        Ipi = 24,
        /// #DB (14).
        Db = 25,
    }
}

c_enum! {
    /// What caused a task switch (`enum task_switch_reason`).
    TaskSwitchReason {
        /// CALL.
        Call = 0,
        /// IRET.
        Iret = 1,
        /// JMP.
        Jmp = 2,
        /// A task gate in the IDT.
        IdtGate = 3,
    }
}

c_enum! {
    /// Which set of CPUs `VM_GET_CPUS` returns.
    CpusetWhich {
        /// vCPUs that were activated.
        Active = 0,
        /// vCPUs that have noticed that the VM is stopping.
        Suspended = 1,
        /// vCPUs that a debugger stopped.
        Debug = 2,
    }
}

impl RegName {
    /// Whether the register has a segment descriptor behind it, as
    /// `VM_GET_SEGMENT_DESCRIPTOR` wants (GDTR and IDTR included).
    pub const fn has_descriptor(self) -> bool {
        matches!(
            self,
            RegName::Es
                | RegName::Cs
                | RegName::Ss
                | RegName::Ds
                | RegName::Fs
                | RegName::Gs
                | RegName::Ldtr
                | RegName::Tr
                | RegName::Idtr
                | RegName::Gdtr
        )
    }
}

impl Capability {
    /// The name that bhyvectl(8) uses (`capstrmap` in libvmmapi).
    pub const fn name(self) -> &'static str {
        match self {
            Capability::HaltExit => "hlt_exit",
            Capability::MtrapExit => "mtrap_exit",
            Capability::PauseExit => "pause_exit",
            Capability::UnrestrictedGuest => "unrestricted_guest",
            Capability::EnableInvpcid => "enable_invpcid",
            Capability::BptExit => "bpt_exit",
            Capability::Rdpid => "rdpid",
            Capability::Rdtscp => "rdtscp",
            Capability::IpiExit => "ipi_exit",
            Capability::MaskHwintr => "mask_hwintr",
            Capability::RflagsTf => "rflags_tf",
        }
    }

    /// The capability with that name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|c| c.name() == name)
    }
}
