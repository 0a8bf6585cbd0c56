//! Why `VM_RUN` returned, as a Rust enum. This is the one place where the C
//! union is read and written.

use crate::layout::{GuestPaging, SegDesc};
use crate::names::{ExitCode, RegName, SuspendHow, TaskSwitchReason};
use crate::raw_exit::*;

/// An exit to userland.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VmExit {
    /// RIP of the instruction that caused it.
    pub rip: u64,
    /// Its length in bytes, 0 = unknown. `VM_RUN` goes on behind it unless
    /// told otherwise.
    pub inst_length: u8,
    /// What happened.
    pub exit: Exit,
}

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// IN or OUT.
    Inout(Inout),
    /// INS or OUTS.
    InoutStr(InoutStr),
    /// A VT-x exit without a better code.
    Vmx(Vmx),
    /// An AMD-V exit without a better code (APM Vol. 2 §15.6).
    Svm {
        /// EXITCODE.
        code: u64,
        /// EXITINFO1.
        info1: u64,
        /// EXITINFO2.
        info2: u64,
    },
    /// Nothing to do: run again.
    Bogus,
    /// RDMSR of an MSR that the kernel does not have.
    Rdmsr {
        /// Its number.
        msr: u32,
    },
    /// WRMSR of such an MSR.
    Wrmsr {
        /// Its number.
        msr: u32,
        /// The value.
        value: u64,
    },
    /// HLT.
    Hlt {
        /// RFLAGS.
        rflags: u64,
        /// Interrupt status, of AVIC hardware.
        intr_status: u64,
    },
    /// One instruction was executed.
    Mtrap,
    /// PAUSE.
    Pause,
    /// A guest-physical page fault that the kernel cannot resolve.
    Paging {
        /// Guest-physical address.
        gpa: u64,
        /// `PROT_*` of what was tried.
        fault_type: i32,
    },
    /// An instruction touched memory that somebody emulates.
    InstEmul(InstEmul),
    /// A start-up IPI for another vCPU.
    SpinupAp {
        /// The vCPU that is to start.
        vcpu: i32,
        /// The SIPI's page address.
        rip: u64,
    },
    /// All vCPUs are to meet (kernel only).
    Rendezvous,
    /// EOI of a level-triggered vector (kernel only).
    IoapicEoi {
        /// Vector.
        vector: i32,
    },
    /// The VM is stopping.
    Suspended(SuspendHow),
    /// A hardware task switch.
    TaskSwitch(TaskSwitch),
    /// MONITOR.
    Monitor,
    /// MWAIT.
    Mwait,
    /// vCPUs are asked to be idle for a moment.
    Reqidle,
    /// The vCPU is stopped by a debugger.
    Debug,
    /// A virtualization instruction.
    Vminsn,
    /// #BP (13).
    Bpt {
        /// Length of the instruction, bytes.
        inst_length: i32,
    },
    /// An inter-processor interrupt that userland emulates (14).
    Ipi {
        /// Delivery mode.
        mode: u32,
        /// Vector.
        vector: u8,
        /// Destination vCPUs, 256 bits; filled in by 13's `VM_RUN` only.
        dmask: [u64; 4],
    },
    /// #DB (14).
    Db {
        /// Single step.
        trace_trap: bool,
        /// A PUSHF was intercepted.
        pushf_intercept: bool,
        /// The guest's own TF.
        tf_shadow: bool,
        /// Paging state.
        paging: GuestPaging,
    },
    /// A code, or a value in the payload, that this crate does not know.
    Unknown {
        /// The code.
        code: u32,
        /// The union.
        payload: [u8; PAYLOAD_LEN],
    },
}

/// An IN or OUT.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Inout {
    /// Port.
    pub port: u16,
    /// Operand size: 1, 2 or 4 bytes.
    pub bytes: u8,
    /// IN or INS.
    pub input: bool,
    /// INS or OUTS.
    pub string: bool,
    /// With a REP prefix.
    pub rep: bool,
    /// Value of OUT.
    pub eax: u32,
}

impl Inout {
    /// From C's bit fields.
    pub const fn from_raw(raw: &InoutRaw) -> Self {
        Inout {
            port: raw.port,
            bytes: (raw.flags & 7) as u8,
            input: raw.flags & 8 != 0,
            string: raw.flags & 0x10 != 0,
            rep: raw.flags & 0x20 != 0,
            eax: raw.eax,
        }
    }

    /// To C's bit fields.
    pub const fn to_raw(&self) -> InoutRaw {
        InoutRaw {
            flags: (self.bytes & 7) as u16
                | (self.input as u16) << 3
                | (self.string as u16) << 4
                | (self.rep as u16) << 5,
            port: self.port,
            eax: self.eax,
        }
    }
}

/// An INS or OUTS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InoutStr {
    /// As for IN and OUT.
    pub inout: Inout,
    /// Paging state.
    pub paging: GuestPaging,
    /// RFLAGS.
    pub rflags: u64,
    /// CR0.
    pub cr0: u64,
    /// RSI or RDI.
    pub index: u64,
    /// RCX with a REP prefix, else 1.
    pub count: u64,
    /// Address size, bytes.
    pub addrsize: u8,
    /// Segment of the memory operand.
    pub seg_name: RegName,
    /// Its descriptor.
    pub seg_desc: SegDesc,
}

/// A VT-x exit without a better code.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Vmx {
    /// 0: an exit; else how VMLAUNCH or VMRESUME failed.
    pub status: i32,
    /// Exit reason (SDM Vol. 3C §24.9.1).
    pub exit_reason: u32,
    /// Exit qualification.
    pub qualification: u64,
    /// Which instruction failed.
    pub inst_type: i32,
    /// VM-instruction error (SDM Vol. 3C §30.4).
    pub inst_error: i32,
}

/// An instruction that touched memory that somebody emulates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InstEmul {
    /// Guest-physical address.
    pub gpa: u64,
    /// Guest-linear address.
    pub gla: u64,
    /// Base of CS.
    pub cs_base: u64,
    /// CS.D.
    pub cs_d: bool,
    /// Paging state.
    pub paging: GuestPaging,
    /// The instruction, bytes and all.
    pub vie: Vie,
}

impl InstEmul {
    /// The instruction's valid bytes.
    pub fn bytes(&self) -> &[u8] {
        let n = usize::from(self.vie.num_valid).min(self.vie.inst.len());
        self.vie.inst.get(..n).unwrap_or(&[])
    }
}

/// A hardware task switch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TaskSwitch {
    /// Selector of the new TSS.
    pub selector: u16,
    /// An external event caused it.
    pub external: bool,
    /// Error code for the new stack.
    pub error_code: Option<u32>,
    /// What caused it.
    pub reason: TaskSwitchReason,
    /// Paging state.
    pub paging: GuestPaging,
}

impl VmExit {
    /// Reads C's structure. What it cannot name becomes [`Exit::Unknown`].
    pub fn from_raw(raw: &VmExitRaw) -> Self {
        VmExit {
            rip: raw.rip,
            inst_length: u8::try_from(raw.inst_length).unwrap_or(0),
            exit: Exit::from_raw(raw).unwrap_or(Exit::Unknown {
                code: raw.exitcode,
                payload: raw.u,
            }),
        }
    }

    /// Writes C's structure.
    pub fn to_raw(&self) -> VmExitRaw {
        let mut raw = VmExitRaw {
            exitcode: self.exit.code(),
            inst_length: i32::from(self.inst_length),
            rip: self.rip,
            ..VmExitRaw::default()
        };
        self.exit.write_payload(&mut raw);
        raw
    }
}

impl Exit {
    fn from_raw(raw: &VmExitRaw) -> Option<Self> {
        Some(match ExitCode::from_raw(raw.exitcode)? {
            ExitCode::Inout => Exit::Inout(Inout::from_raw(&raw.payload())),
            ExitCode::InoutStr => {
                let p: InoutStrRaw = raw.payload();
                Exit::InoutStr(InoutStr {
                    inout: Inout::from_raw(&p.inout),
                    paging: p.paging,
                    rflags: p.rflags,
                    cr0: p.cr0,
                    index: p.index,
                    count: p.count,
                    addrsize: u8::try_from(p.addrsize).ok()?,
                    seg_name: RegName::from_raw(p.seg_name)?,
                    seg_desc: p.seg_desc,
                })
            }
            ExitCode::Vmx => {
                let p: VmxRaw = raw.payload();
                Exit::Vmx(Vmx {
                    status: p.status,
                    exit_reason: p.exit_reason,
                    qualification: p.exit_qualification,
                    inst_type: p.inst_type,
                    inst_error: p.inst_error,
                })
            }
            ExitCode::Svm => {
                let p: SvmRaw = raw.payload();
                Exit::Svm {
                    code: p.exitcode,
                    info1: p.exitinfo1,
                    info2: p.exitinfo2,
                }
            }
            ExitCode::Bogus => Exit::Bogus,
            ExitCode::Rdmsr => Exit::Rdmsr {
                msr: raw.payload::<MsrRaw>().code,
            },
            ExitCode::Wrmsr => {
                let p: MsrRaw = raw.payload();
                Exit::Wrmsr {
                    msr: p.code,
                    value: p.wval,
                }
            }
            ExitCode::Hlt => {
                let p: HltRaw = raw.payload();
                Exit::Hlt {
                    rflags: p.rflags,
                    intr_status: p.intr_status,
                }
            }
            ExitCode::Mtrap => Exit::Mtrap,
            ExitCode::Pause => Exit::Pause,
            ExitCode::Paging => {
                let p: PagingRaw = raw.payload();
                Exit::Paging {
                    gpa: p.gpa,
                    fault_type: p.fault_type,
                }
            }
            ExitCode::InstEmul => {
                let p: InstEmulRaw = raw.payload();
                Exit::InstEmul(InstEmul {
                    gpa: p.gpa,
                    gla: p.gla,
                    cs_base: p.cs_base,
                    cs_d: p.cs_d != 0,
                    paging: p.paging,
                    vie: p.vie,
                })
            }
            ExitCode::SpinupAp => {
                let p: SpinupApRaw = raw.payload();
                Exit::SpinupAp {
                    vcpu: p.vcpu,
                    rip: p.rip,
                }
            }
            ExitCode::Deprecated1 => return None,
            ExitCode::Rendezvous => Exit::Rendezvous,
            ExitCode::IoapicEoi => Exit::IoapicEoi {
                vector: raw.payload::<IoapicEoiRaw>().vector,
            },
            ExitCode::Suspended => {
                Exit::Suspended(SuspendHow::from_raw(raw.payload::<SuspendedRaw>().how)?)
            }
            ExitCode::TaskSwitch => {
                let p: TaskSwitchRaw = raw.payload();
                Exit::TaskSwitch(TaskSwitch {
                    selector: p.tsssel,
                    external: p.ext != 0,
                    error_code: (p.errcode_valid != 0).then_some(p.errcode),
                    reason: TaskSwitchReason::from_raw(p.reason)?,
                    paging: p.paging,
                })
            }
            ExitCode::Monitor => Exit::Monitor,
            ExitCode::Mwait => Exit::Mwait,
            ExitCode::Reqidle => Exit::Reqidle,
            ExitCode::Debug => Exit::Debug,
            ExitCode::Vminsn => Exit::Vminsn,
            ExitCode::Bpt => Exit::Bpt {
                inst_length: raw.payload::<BptRaw>().inst_length,
            },
            ExitCode::Ipi => {
                let p: IpiRaw = raw.payload();
                Exit::Ipi {
                    mode: p.mode,
                    vector: p.vector,
                    dmask: p.dmask,
                }
            }
            ExitCode::Db => {
                let p: DbRaw = raw.payload();
                Exit::Db {
                    trace_trap: p.trace_trap != 0,
                    pushf_intercept: p.pushf_intercept != 0,
                    tf_shadow: p.tf_shadow_val != 0,
                    paging: p.paging,
                }
            }
        })
    }

    /// The number of the exit, [`ExitCode`] where it is known.
    pub const fn code(&self) -> u32 {
        match self {
            Exit::Inout(_) => ExitCode::Inout.raw(),
            Exit::InoutStr(_) => ExitCode::InoutStr.raw(),
            Exit::Vmx(_) => ExitCode::Vmx.raw(),
            Exit::Svm { .. } => ExitCode::Svm.raw(),
            Exit::Bogus => ExitCode::Bogus.raw(),
            Exit::Rdmsr { .. } => ExitCode::Rdmsr.raw(),
            Exit::Wrmsr { .. } => ExitCode::Wrmsr.raw(),
            Exit::Hlt { .. } => ExitCode::Hlt.raw(),
            Exit::Mtrap => ExitCode::Mtrap.raw(),
            Exit::Pause => ExitCode::Pause.raw(),
            Exit::Paging { .. } => ExitCode::Paging.raw(),
            Exit::InstEmul(_) => ExitCode::InstEmul.raw(),
            Exit::SpinupAp { .. } => ExitCode::SpinupAp.raw(),
            Exit::Rendezvous => ExitCode::Rendezvous.raw(),
            Exit::IoapicEoi { .. } => ExitCode::IoapicEoi.raw(),
            Exit::Suspended(_) => ExitCode::Suspended.raw(),
            Exit::TaskSwitch(_) => ExitCode::TaskSwitch.raw(),
            Exit::Monitor => ExitCode::Monitor.raw(),
            Exit::Mwait => ExitCode::Mwait.raw(),
            Exit::Reqidle => ExitCode::Reqidle.raw(),
            Exit::Debug => ExitCode::Debug.raw(),
            Exit::Vminsn => ExitCode::Vminsn.raw(),
            Exit::Bpt { .. } => ExitCode::Bpt.raw(),
            Exit::Ipi { .. } => ExitCode::Ipi.raw(),
            Exit::Db { .. } => ExitCode::Db.raw(),
            Exit::Unknown { code, .. } => *code,
        }
    }

    fn write_payload(&self, raw: &mut VmExitRaw) {
        match *self {
            Exit::Inout(io) => raw.set_payload(&io.to_raw()),
            Exit::InoutStr(s) => raw.set_payload(&InoutStrRaw {
                inout: s.inout.to_raw(),
                paging: s.paging,
                rflags: s.rflags,
                cr0: s.cr0,
                index: s.index,
                count: s.count,
                addrsize: i32::from(s.addrsize),
                seg_name: s.seg_name.raw(),
                seg_desc: s.seg_desc,
            }),
            Exit::Vmx(v) => raw.set_payload(&VmxRaw {
                status: v.status,
                exit_reason: v.exit_reason,
                exit_qualification: v.qualification,
                inst_type: v.inst_type,
                inst_error: v.inst_error,
            }),
            Exit::Svm { code, info1, info2 } => raw.set_payload(&SvmRaw {
                exitcode: code,
                exitinfo1: info1,
                exitinfo2: info2,
            }),
            Exit::Rdmsr { msr } => raw.set_payload(&MsrRaw {
                code: msr,
                ..MsrRaw::default()
            }),
            Exit::Wrmsr { msr, value } => raw.set_payload(&MsrRaw {
                code: msr,
                _pad0: 0,
                wval: value,
            }),
            Exit::Hlt {
                rflags,
                intr_status,
            } => raw.set_payload(&HltRaw {
                rflags,
                intr_status,
            }),
            Exit::Paging { gpa, fault_type } => raw.set_payload(&PagingRaw {
                gpa,
                fault_type,
                _pad0: 0,
            }),
            Exit::InstEmul(e) => raw.set_payload(&InstEmulRaw {
                gpa: e.gpa,
                gla: e.gla,
                cs_base: e.cs_base,
                cs_d: i32::from(e.cs_d),
                _pad0: 0,
                paging: e.paging,
                vie: e.vie,
            }),
            Exit::SpinupAp { vcpu, rip } => raw.set_payload(&SpinupApRaw {
                vcpu,
                _pad0: 0,
                rip,
            }),
            Exit::IoapicEoi { vector } => raw.set_payload(&IoapicEoiRaw { vector }),
            Exit::Suspended(how) => raw.set_payload(&SuspendedRaw { how: how.raw() }),
            Exit::TaskSwitch(t) => raw.set_payload(&TaskSwitchRaw {
                tsssel: t.selector,
                _pad0: 0,
                ext: i32::from(t.external),
                errcode: t.error_code.unwrap_or(0),
                errcode_valid: i32::from(t.error_code.is_some()),
                reason: t.reason.raw(),
                _pad1: 0,
                paging: t.paging,
            }),
            Exit::Bpt { inst_length } => raw.set_payload(&BptRaw { inst_length }),
            Exit::Ipi {
                mode,
                vector,
                dmask,
            } => raw.set_payload(&IpiRaw {
                mode,
                vector,
                _pad0: [0; 3],
                dmask,
            }),
            Exit::Db {
                trace_trap,
                pushf_intercept,
                tf_shadow,
                paging,
            } => raw.set_payload(&DbRaw {
                trace_trap: i32::from(trace_trap),
                pushf_intercept: i32::from(pushf_intercept),
                tf_shadow_val: i32::from(tf_shadow),
                _pad0: 0,
                paging,
            }),
            Exit::Unknown { payload, .. } => raw.u = payload,
            Exit::Bogus
            | Exit::Mtrap
            | Exit::Pause
            | Exit::Rendezvous
            | Exit::Monitor
            | Exit::Mwait
            | Exit::Reqidle
            | Exit::Debug
            | Exit::Vminsn => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn c_bytes_become_the_exit_they_mean() {
        // An OUT of 0x41 to port 0x3f8 as the C structure lies in memory.
        let mut bytes = [0u8; 136];
        bytes[4] = 1; // inst_length
        bytes[8..16].copy_from_slice(&0x1000u64.to_le_bytes());
        bytes[16] = 1; // one byte, out
        bytes[18..20].copy_from_slice(&0x3f8u16.to_le_bytes());
        bytes[20] = 0x41;
        let raw: VmExitRaw = zerocopy::transmute!(bytes);
        let exit = VmExit::from_raw(&raw);
        assert_eq!(
            exit,
            VmExit {
                rip: 0x1000,
                inst_length: 1,
                exit: Exit::Inout(Inout {
                    port: 0x3f8,
                    bytes: 1,
                    eax: 0x41,
                    ..Inout::default()
                }),
            }
        );
        assert_eq!(exit.to_raw(), raw);
    }

    #[test]
    fn every_exit_survives_the_way_through_c() {
        let paging = GuestPaging {
            cr3: 0x1234_5000,
            cpl: 3,
            cpu_mode: 3,
            paging_mode: 3,
            _pad0: 0,
        };
        let mut vie = Vie::default();
        vie.inst[..3].copy_from_slice(&[0x8b, 0x47, 0x20]);
        vie.num_valid = 3;
        let exits = [
            Exit::Inout(Inout {
                port: 0x71,
                bytes: 4,
                input: true,
                ..Inout::default()
            }),
            Exit::InoutStr(InoutStr {
                inout: Inout {
                    port: 0x1f0,
                    bytes: 2,
                    input: true,
                    string: true,
                    rep: true,
                    eax: 0,
                },
                paging,
                rflags: 2,
                cr0: 0x8000_0011,
                index: 0xffff_8000_0000_1000,
                count: 256,
                addrsize: 8,
                seg_name: RegName::Es,
                seg_desc: SegDesc {
                    base: 0,
                    limit: !0,
                    access: 0xc093,
                },
            }),
            Exit::Vmx(Vmx {
                exit_reason: 33,
                qualification: 7,
                ..Vmx::default()
            }),
            Exit::Svm {
                code: 0x400,
                info1: 1,
                info2: 2,
            },
            Exit::Bogus,
            Exit::Rdmsr { msr: 0xc001_0015 },
            Exit::Wrmsr {
                msr: 0x8b,
                value: !0,
            },
            Exit::Hlt {
                rflags: 0x202,
                intr_status: 0,
            },
            Exit::Paging {
                gpa: 0xfee0_0000,
                fault_type: 2,
            },
            Exit::InstEmul(InstEmul {
                gpa: 0xfed0_0000,
                gla: 1,
                cs_base: 2,
                cs_d: true,
                paging,
                vie,
            }),
            Exit::SpinupAp {
                vcpu: 3,
                rip: 0x9_8000,
            },
            Exit::IoapicEoi { vector: 0x30 },
            Exit::Suspended(SuspendHow::TripleFault),
            Exit::TaskSwitch(TaskSwitch {
                selector: 0x28,
                external: true,
                error_code: Some(9),
                reason: TaskSwitchReason::IdtGate,
                paging,
            }),
            Exit::Bpt { inst_length: 1 },
            Exit::Ipi {
                mode: 0x600,
                vector: 9,
                dmask: [5, 0, 0, 1],
            },
            Exit::Db {
                trace_trap: true,
                pushf_intercept: false,
                tf_shadow: true,
                paging,
            },
            Exit::Vminsn,
        ];
        for exit in exits {
            let vm_exit = VmExit {
                rip: 0xffff_ffff_8020_0000,
                inst_length: 2,
                exit,
            };
            assert_eq!(VmExit::from_raw(&vm_exit.to_raw()), vm_exit);
        }
    }

    #[test]
    fn what_has_no_name_is_kept_as_it_came() {
        for code in [11, 26, u32::MAX] {
            let raw = VmExitRaw {
                exitcode: code,
                u: [7; PAYLOAD_LEN],
                ..VmExitRaw::default()
            };
            assert_eq!(
                VmExit::from_raw(&raw).exit,
                Exit::Unknown {
                    code,
                    payload: [7; PAYLOAD_LEN]
                }
            );
            assert_eq!(VmExit::from_raw(&raw).to_raw(), raw);
        }
        let mut raw = VmExitRaw {
            exitcode: 14,
            ..VmExitRaw::default()
        };
        raw.set_payload(&SuspendedRaw { how: 99 });
        assert!(matches!(
            VmExit::from_raw(&raw).exit,
            Exit::Unknown { code: 14, .. }
        ));
    }

    #[test]
    fn a_lying_length_of_instruction_bytes_is_cut() {
        let vie = Vie {
            num_valid: 200,
            ..Vie::default()
        };
        let e = InstEmul {
            gpa: 0,
            gla: 0,
            cs_base: 0,
            cs_d: false,
            paging: GuestPaging::default(),
            vie,
        };
        assert_eq!(e.bytes().len(), 15);
    }
}
