//! A VM: what is asked of it as a whole.

use crate::error::{Error, Result};
use crate::sys::{self, CTL, Plain};
use crate::vcpu::Vcpu;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};
use vmm_abi::layout::*;
use vmm_abi::limits::{MAX_VM_STATS, VM_MAX_NAMELEN};
use vmm_abi::names::{CpusetWhich, IntrTrigger, SuspendHow};
use vmm_abi::request::*;

/// An open VM. Clones share the open device; any thread may use any of them.
#[derive(Clone, Debug)]
pub struct Vm {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    dev: File,
    name: String,
    /// `EXT_F_*` of the kernel piece.
    features: u32,
}

/// A mapping of a memory segment into guest-physical memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// Guest-physical address, bytes.
    pub gpa: u64,
    /// Segment.
    pub segid: i32,
    /// Offset into the segment, bytes.
    pub segoff: u64,
    /// Length, bytes.
    pub len: u64,
    /// `PROT_*`.
    pub prot: i32,
    /// `VM_MEMMAP_F_*`.
    pub flags: i32,
}

/// A memory segment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemSegment {
    /// Length, bytes.
    pub len: u64,
    /// Name of device memory; `None` for system memory.
    pub name: Option<String>,
}

/// A statistic.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stat {
    /// What it counts.
    pub desc: String,
    /// Its value.
    pub value: u64,
}

/// A set of vCPUs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CpuSet([u64; 16]);

impl CpuSet {
    /// Whether it contains a vCPU.
    pub fn contains(&self, cpu: u32) -> bool {
        self.0
            .get(cpu as usize / 64)
            .is_some_and(|w| w >> (cpu % 64) & 1 != 0)
    }
    /// The vCPUs in it, in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        (0..1024).filter(|&cpu| self.contains(cpu))
    }
    /// How many there are.
    pub fn count(&self) -> usize {
        self.0.iter().map(|w| w.count_ones() as usize).sum()
    }
}

impl Vm {
    /// Makes a VM and opens it.
    ///
    /// # Errors
    /// [`Error::Name`]; [`Error::Open`] without the kernel module;
    /// [`Error::Create`] with EEXIST where there is one of that name.
    pub fn create(name: &str) -> Result<Vm> {
        check_name(name)?;
        match control(name, VMMCTL_VM_CREATE, "hw.vmm.create") {
            Ok(()) => {}
            Err(Control::Open(source)) => {
                return Err(Error::Open {
                    path: CTL.into(),
                    source,
                });
            }
            Err(Control::Refused(source)) => {
                return Err(Error::Create {
                    vm: name.into(),
                    source,
                });
            }
        }
        // The node may appear a moment after the VM.
        let deadline = Instant::now() + Duration::from_secs(2);
        loop {
            match Self::open(name) {
                Err(e) if e.is_not_found() && Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(5));
                }
                done => return done,
            }
        }
    }

    /// Opens a VM that exists.
    ///
    /// # Errors
    /// [`Error::Name`], [`Error::Open`].
    pub fn open(name: &str) -> Result<Vm> {
        check_name(name)?;
        let path = format!("/dev/vmm/{name}");
        let dev = sys::open(&path).map_err(|source| Error::Open { path, source })?;
        let mut ext = VmExtVersion::default();
        // FreeBSD's own kernel piece does not know the request.
        let features = match sys::ioctl(dev.as_fd(), VM_EXT_VERSION, &mut ext) {
            Ok(()) if ext.abi_version == EXT_ABI_VERSION => ext.features,
            _ => 0,
        };
        Ok(Vm {
            inner: Arc::new(Inner {
                dev,
                name: name.into(),
                features,
            }),
        })
    }

    /// Opens a VM, making it first where there is none. True: it was made.
    ///
    /// # Errors
    /// As [`Vm::open`] and [`Vm::create`].
    pub fn open_or_create(name: &str) -> Result<(Vm, bool)> {
        match Self::open(name) {
            Err(e) if e.is_not_found() => Ok((Self::create(name)?, true)),
            opened => Ok((opened?, false)),
        }
    }

    /// Destroys a VM, running or not.
    ///
    /// # Errors
    /// [`Error::Open`] without the kernel module; [`Error::Destroy`].
    pub fn destroy(name: &str) -> Result<()> {
        check_name(name)?;
        control(name, VMMCTL_VM_DESTROY, "hw.vmm.destroy").map_err(|e| match e {
            Control::Open(source) => Error::Open {
                path: CTL.into(),
                source,
            },
            Control::Refused(source) => Error::Destroy {
                vm: name.into(),
                source,
            },
        })
    }

    /// Names of the VMs that exist, sorted.
    ///
    /// # Errors
    /// [`Error::Open`] when the directory cannot be read.
    pub fn list() -> Result<Vec<String>> {
        let path = "/dev/vmm";
        let fail = |source| Error::Open {
            path: path.into(),
            source,
        };
        let dir = match std::fs::read_dir(path) {
            // The directory comes with the first VM.
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            dir => dir.map_err(fail)?,
        };
        let mut names = Vec::new();
        for entry in dir {
            names.push(
                entry
                    .map_err(fail)?
                    .file_name()
                    .to_string_lossy()
                    .into_owned(),
            );
        }
        names.sort();
        Ok(names)
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.inner.name
    }

    /// A handle on a vCPU. It comes into being when it is activated.
    pub fn vcpu(&self, id: u32) -> Vcpu {
        Vcpu::new(self.clone(), id)
    }

    /// What the kernel piece has beyond FreeBSD's interface; `None` where it is
    /// FreeBSD's own.
    pub fn ext_version(&self) -> Option<ExtVersion> {
        let mut arg = VmExtVersion::default();
        self.request(VM_EXT_VERSION, &mut arg).ok().map(|()| arg)
    }

    /// Whether the kernel piece has a feature (`EXT_F_*`) beyond FreeBSD's
    /// interface.
    pub fn has(&self, feature: u32) -> bool {
        self.inner.features & feature != 0
    }

    /// Makes the kernel answer one-byte INs from `port` with `value`, or ask
    /// userland again. Does nothing where the kernel piece is FreeBSD's own:
    /// then it always asks.
    ///
    /// # Errors
    /// ENOSPC where too many ports are answered already.
    pub fn set_constant_port(&self, port: u16, value: Option<u8>) -> Result<()> {
        if !self.has(EXT_F_CONSTANT_PORT) {
            return Ok(());
        }
        let mut arg = VmExtConstantPort {
            port,
            on: u16::from(value.is_some()),
            value: value.unwrap_or(0).into(),
        };
        self.request(VM_EXT_CONSTANT_PORT, &mut arg)
    }

    /// Stops the VM.
    ///
    /// # Errors
    /// EALREADY where it is stopping already.
    pub fn suspend(&self, how: SuspendHow) -> Result<()> {
        self.request(VM_SUSPEND, &mut VmSuspend { how: how.raw() })
    }

    /// Brings the VM back to power-on state; its memory stays.
    ///
    /// # Errors
    /// EBUSY while a vCPU runs.
    pub fn reinit(&self) -> Result<()> {
        sys::retry(|| sys::ioctl_void(self.fd(), VM_REINIT))
            .map_err(|e| self.error(VM_REINIT, None, e))
    }

    // ---- memory --------------------------------------------------------

    /// Makes a memory segment; `name` is for device memory.
    ///
    /// # Errors
    /// EEXIST, EINVAL; [`Error::Name`] where the name does not fit.
    pub fn alloc_memseg(&self, segid: i32, len: u64, name: Option<&str>) -> Result<()> {
        let mut arg = VmMemseg {
            segid,
            len,
            ..VmMemseg::default()
        };
        if !set_c_name(&mut arg.name, name.unwrap_or("").as_bytes()) {
            return Err(Error::Name {
                vm: name.unwrap_or("").into(),
            });
        }
        self.request(VM_ALLOC_MEMSEG, &mut arg)
    }

    /// Describes a memory segment; `None` where there is none.
    ///
    /// # Errors
    /// EINVAL for a number that no segment can have.
    pub fn memseg(&self, segid: i32) -> Result<Option<MemSegment>> {
        let mut arg = VmMemseg {
            segid,
            ..VmMemseg::default()
        };
        self.request(VM_GET_MEMSEG, &mut arg)?;
        if arg.len == 0 {
            return Ok(None);
        }
        let name = c_name(&arg.name).unwrap_or(&arg.name);
        let name = (!name.is_empty()).then(|| String::from_utf8_lossy(name).into_owned());
        Ok(Some(MemSegment { len: arg.len, name }))
    }

    /// Maps part of a segment into guest-physical memory.
    ///
    /// # Errors
    /// EINVAL for ranges out of bounds, ENOSPC when there are too many.
    pub fn mmap_memseg(&self, m: &Mapping) -> Result<()> {
        let mut arg = VmMemmap {
            gpa: m.gpa,
            segid: m.segid,
            _pad0: 0,
            segoff: m.segoff as i64,
            len: m.len,
            prot: m.prot,
            flags: m.flags,
        };
        self.request(VM_MMAP_MEMSEG, &mut arg)
    }

    /// Unmaps guest memory (FreeBSD 13 and later).
    ///
    /// # Errors
    /// EINVAL where that is no mapping.
    pub fn munmap_memseg(&self, gpa: u64, len: u64) -> Result<()> {
        self.request(VM_MUNMAP_MEMSEG, &mut VmMunmap { gpa, len })
    }

    /// The first mapping at or above an address; `None` where there is none.
    ///
    /// # Errors
    /// What the kernel says, other than ENOENT.
    pub fn mmap_getnext(&self, gpa: u64) -> Result<Option<Mapping>> {
        let mut arg = VmMemmap {
            gpa,
            ..VmMemmap::default()
        };
        match self.request(VM_MMAP_GETNEXT, &mut arg) {
            Ok(()) => Ok(Some(Mapping {
                gpa: arg.gpa,
                segid: arg.segid,
                segoff: arg.segoff as u64,
                len: arg.len,
                prot: arg.prot,
                flags: arg.flags,
            })),
            Err(e) if e.errno() == Some(libc::ENOENT) => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// All mappings, by address.
    ///
    /// # Errors
    /// As [`Vm::mmap_getnext`].
    pub fn mappings(&self) -> Result<Vec<Mapping>> {
        let mut all = Vec::new();
        let mut gpa = 0;
        while let Some(m) = self.mmap_getnext(gpa)? {
            all.push(m);
            match m.gpa.checked_add(m.len) {
                Some(next) if next > gpa => gpa = next,
                _ => break,
            }
        }
        Ok(all)
    }

    /// Nested page-table entries of a page, from the top level down.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn gpa_pmap(&self, gpa: u64) -> Result<Vec<u64>> {
        let mut arg = VmGpaPte {
            gpa,
            ..VmGpaPte::default()
        };
        self.request(VM_GET_GPA_PMAP, &mut arg)?;
        let n = usize::try_from(arg.ptenum).unwrap_or(0).min(arg.pte.len());
        Ok(arg.pte[..n].to_vec())
    }

    // ---- interrupts ----------------------------------------------------

    /// Delivers an MSI (SDM Vol. 3A §10.11).
    ///
    /// # Errors
    /// EINVAL for an address that is none of the local APICs'.
    pub fn lapic_msi(&self, addr: u64, msg: u64) -> Result<()> {
        self.request(VM_LAPIC_MSI, &mut VmLapicMsi { msg, addr })
    }

    /// Raises a pin of the IOAPIC.
    ///
    /// # Errors
    /// EINVAL for a pin that it lacks.
    pub fn ioapic_assert(&self, pin: u32) -> Result<()> {
        self.request(VM_IOAPIC_ASSERT_IRQ, &mut VmIoapicIrq { irq: pin as i32 })
    }

    /// Lowers a pin of the IOAPIC.
    ///
    /// # Errors
    /// EINVAL for a pin that it lacks.
    pub fn ioapic_deassert(&self, pin: u32) -> Result<()> {
        self.request(VM_IOAPIC_DEASSERT_IRQ, &mut VmIoapicIrq { irq: pin as i32 })
    }

    /// Raises and lowers a pin of the IOAPIC.
    ///
    /// # Errors
    /// EINVAL for a pin that it lacks.
    pub fn ioapic_pulse(&self, pin: u32) -> Result<()> {
        self.request(VM_IOAPIC_PULSE_IRQ, &mut VmIoapicIrq { irq: pin as i32 })
    }

    /// Number of pins of the IOAPIC.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn ioapic_pincount(&self) -> Result<u32> {
        let mut pins = 0i32;
        self.request(VM_IOAPIC_PINCOUNT, &mut pins)?;
        self.answer(VM_IOAPIC_PINCOUNT, pins)
    }

    /// Raises an ISA line: of the 8259 pair, and of the IOAPIC where a pin is
    /// given.
    ///
    /// # Errors
    /// EINVAL for lines that do not exist.
    pub fn isa_assert(&self, atpic_irq: u32, ioapic_pin: Option<u32>) -> Result<()> {
        self.request(VM_ISA_ASSERT_IRQ, &mut isa(atpic_irq, ioapic_pin))
    }

    /// Lowers an ISA line.
    ///
    /// # Errors
    /// EINVAL for lines that do not exist.
    pub fn isa_deassert(&self, atpic_irq: u32, ioapic_pin: Option<u32>) -> Result<()> {
        self.request(VM_ISA_DEASSERT_IRQ, &mut isa(atpic_irq, ioapic_pin))
    }

    /// Raises and lowers an ISA line.
    ///
    /// # Errors
    /// EINVAL for lines that do not exist.
    pub fn isa_pulse(&self, atpic_irq: u32, ioapic_pin: Option<u32>) -> Result<()> {
        self.request(VM_ISA_PULSE_IRQ, &mut isa(atpic_irq, ioapic_pin))
    }

    /// Sets the trigger mode of an ISA line.
    ///
    /// # Errors
    /// EINVAL for lines whose mode is fixed.
    pub fn isa_set_trigger(&self, atpic_irq: u32, trigger: IntrTrigger) -> Result<()> {
        let mut arg = VmIsaIrqTrigger {
            atpic_irq: atpic_irq as i32,
            trigger: trigger.raw(),
        };
        self.request(VM_ISA_SET_IRQ_TRIGGER, &mut arg)
    }

    /// Raises an LVT entry of every vCPU's local APIC.
    ///
    /// # Errors
    /// EINVAL for an entry that does not exist.
    pub fn lapic_local_irq_all(&self, lvt: i32) -> Result<()> {
        self.request(
            VM_LAPIC_LOCAL_IRQ,
            &mut VmLapicIrq {
                cpuid: -1,
                vector: lvt,
            },
        )
    }

    // ---- devices in the kernel ------------------------------------------

    /// Low half of the HPET's capabilities register.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn hpet_capabilities(&self) -> Result<u32> {
        let mut arg = VmHpetCap::default();
        self.request(VM_GET_HPET_CAPABILITIES, &mut arg)?;
        Ok(arg.capabilities)
    }

    /// Writes a byte of the RTC's memory.
    ///
    /// # Errors
    /// EINVAL for offsets that hold the time.
    pub fn rtc_write(&self, offset: u32, value: u8) -> Result<()> {
        let mut arg = VmRtcData {
            offset: offset as i32,
            value,
            ..VmRtcData::default()
        };
        self.request(VM_RTC_WRITE, &mut arg)
    }

    /// Reads a byte of the RTC's memory.
    ///
    /// # Errors
    /// EINVAL for an offset beyond it.
    pub fn rtc_read(&self, offset: u32) -> Result<u8> {
        let mut arg = VmRtcData {
            offset: offset as i32,
            ..VmRtcData::default()
        };
        self.request(VM_RTC_READ, &mut arg)?;
        Ok(arg.value)
    }

    /// Sets the RTC, seconds since the epoch.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn rtc_settime(&self, secs: i64) -> Result<()> {
        self.request(VM_RTC_SETTIME, &mut VmRtcTime { secs })
    }

    /// Reads the RTC, seconds since the epoch.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn rtc_gettime(&self) -> Result<i64> {
        let mut arg = VmRtcTime::default();
        self.request(VM_RTC_GETTIME, &mut arg)?;
        Ok(arg.secs)
    }

    // ---- CPUs ----------------------------------------------------------

    /// Sets the topology, before vCPUs are activated.
    ///
    /// # Errors
    /// EINVAL for more vCPUs than the kernel can have.
    pub fn set_topology(&self, t: Topology) -> Result<()> {
        self.request(VM_SET_TOPOLOGY, &mut { t })
    }

    /// The topology.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn topology(&self) -> Result<Topology> {
        let mut arg = VmCpuTopology::default();
        self.request(VM_GET_TOPOLOGY, &mut arg)?;
        Ok(arg)
    }

    /// A set of vCPUs.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn cpus(&self, which: CpusetWhich) -> Result<CpuSet> {
        let mut set = CpuSet::default();
        let which = which.raw() as i32;
        // FreeBSD 14 has 1,024 bits; before, exactly 256 were accepted.
        sys::retry(|| sys::get_cpus(self.fd(), which, &mut set.0))
            .or_else(|e| match e.raw_os_error() {
                Some(libc::ERANGE) => {
                    sys::retry(|| sys::get_cpus(self.fd(), which, &mut set.0[..4]))
                }
                _ => Err(e),
            })
            .map_err(|e| self.error(VM_GET_CPUS, None, e))?;
        Ok(set)
    }

    /// Stops all vCPUs for a debugger.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn suspend_all_cpus(&self) -> Result<()> {
        self.request(VM_SUSPEND_CPU, &mut VmActivateCpu { vcpuid: -1 })
    }

    /// Lets them go on.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn resume_all_cpus(&self) -> Result<()> {
        self.request(VM_RESUME_CPU, &mut VmActivateCpu { vcpuid: -1 })
    }

    /// What statistic `index` counts; `None` beyond the last.
    ///
    /// # Errors
    /// What the kernel says, other than EINVAL.
    pub fn stat_desc(&self, index: u32) -> Result<Option<String>> {
        let mut arg = VmStatDesc {
            index: index as i32,
            ..VmStatDesc::default()
        };
        match self.request(VM_STAT_DESC, &mut arg) {
            Ok(()) => {
                let text = c_name(&arg.desc).unwrap_or(&arg.desc);
                Ok(Some(String::from_utf8_lossy(text).into_owned()))
            }
            Err(e) if e.errno() == Some(libc::EINVAL) => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Values of a vCPU's statistics, by index.
    pub(crate) fn stat_values(&self, cpu: i32) -> Result<Vec<u64>> {
        let mut values = Vec::new();
        loop {
            let mut arg = VmStats14 {
                cpuid: cpu,
                index: values.len() as i32,
                ..VmStats14::default()
            };
            match self.request_cpu(VM_STATS_14, cpu, &mut arg) {
                Ok(()) => {}
                // 12 and 13 know one page only.
                Err(e) if e.errno() == Some(libc::ENOTTY) && values.is_empty() => {
                    let mut arg = VmStats {
                        cpuid: cpu,
                        ..VmStats::default()
                    };
                    self.request_cpu(VM_STATS, cpu, &mut arg)?;
                    values.extend(valid(arg.num_entries, &arg.statbuf));
                    return Ok(values);
                }
                // Past the end.
                Err(e) if e.errno() == Some(libc::EINVAL) && !values.is_empty() => {
                    return Ok(values);
                }
                Err(e) => return Err(e),
            }
            let page = valid(arg.num_entries, &arg.statbuf);
            values.extend(page);
            if page.len() < MAX_VM_STATS {
                return Ok(values);
            }
        }
    }

    // ---- passthrough ----------------------------------------------------

    /// Gives a host PCI function to the VM.
    ///
    /// # Errors
    /// ENOENT or ENXIO where it is not set aside for passthrough.
    pub fn bind_pptdev(&self, bus: i32, slot: i32, func: i32) -> Result<()> {
        self.request(VM_BIND_PPTDEV, &mut VmPptdev { bus, slot, func })
    }

    /// Takes it back.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn unbind_pptdev(&self, bus: i32, slot: i32, func: i32) -> Result<()> {
        self.request(VM_UNBIND_PPTDEV, &mut VmPptdev { bus, slot, func })
    }

    // ---- underneath ------------------------------------------------------

    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.inner.dev.as_fd()
    }

    pub(crate) fn request<T: Plain>(&self, request: u32, arg: &mut T) -> Result<()> {
        sys::retry(|| sys::ioctl(self.fd(), request, arg)).map_err(|e| self.error(request, None, e))
    }

    pub(crate) fn request_cpu<T: Plain>(&self, request: u32, cpu: i32, arg: &mut T) -> Result<()> {
        sys::retry(|| sys::ioctl(self.fd(), request, arg))
            .map_err(|e| self.error(request, Some(cpu), e))
    }

    pub(crate) fn error(&self, request: u32, vcpu: Option<i32>, source: io::Error) -> Error {
        let request = vmm_abi::request::name(request).unwrap_or("unknown request");
        Error::Request {
            vm: self.name().into(),
            vcpu,
            request,
            source,
        }
    }

    /// An answer from the kernel that must be a number of the wanted type.
    pub(crate) fn answer<T, V>(&self, request: u32, value: V) -> Result<T>
    where
        V: Copy + Into<i64>,
        T: TryFrom<V>,
    {
        T::try_from(value).map_err(|_| Error::Answer {
            vm: self.name().into(),
            request: vmm_abi::request::name(request).unwrap_or("unknown request"),
            value: value.into(),
        })
    }
}

type ExtVersion = VmExtVersion;
type Topology = VmCpuTopology;

fn valid(num_entries: i32, buf: &[u64]) -> &[u64] {
    &buf[..usize::try_from(num_entries).unwrap_or(0).min(buf.len())]
}

fn isa(atpic_irq: u32, ioapic_pin: Option<u32>) -> VmIsaIrq {
    VmIsaIrq {
        atpic_irq: atpic_irq as i32,
        ioapic_irq: ioapic_pin.map_or(-1, |p| p as i32),
    }
}

fn check_name(name: &str) -> Result<()> {
    let fits = (1..=VM_MAX_NAMELEN).contains(&name.len());
    if !fits || name.contains(['/', '\0']) || name == "." || name == ".." {
        return Err(Error::Name { vm: name.into() });
    }
    Ok(())
}

enum Control {
    Open(io::Error),
    Refused(io::Error),
}

/// Makes or destroys a VM: by the control device, or on FreeBSD before 15 by a
/// sysctl.
fn control(name: &str, request: u32, sysctl: &str) -> std::result::Result<(), Control> {
    let ctl = match sys::open(CTL) {
        Ok(ctl) => ctl,
        Err(e) if e.kind() == io::ErrorKind::NotFound && cfg!(target_os = "freebsd") => {
            return sys::sysctl_write(sysctl, name).map_err(Control::Refused);
        }
        Err(e) => return Err(Control::Open(e)),
    };
    let mut arg = VmmctlVm::default();
    if !set_c_name(&mut arg.name, name.as_bytes()) {
        return Err(Control::Refused(io::Error::from_raw_os_error(
            libc::ENAMETOOLONG,
        )));
    }
    sys::retry(|| sys::ioctl(ctl.as_fd(), request, &mut arg)).map_err(Control::Refused)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_would_leave_the_directory_are_refused() {
        for bad in [
            "",
            "a/b",
            "..",
            ".",
            "nul\0",
            &"x".repeat(VM_MAX_NAMELEN + 1),
        ] {
            assert!(matches!(Vm::open(bad), Err(Error::Name { .. })), "{bad:?}");
        }
        assert!(!matches!(Vm::open("no-such-vm"), Err(Error::Name { .. })));
    }

    #[test]
    fn a_set_of_cpus_counts_and_lists_its_members() {
        let mut set = CpuSet::default();
        set.0[0] = 0b101;
        set.0[1] = 1;
        set.0[15] = 1 << 63;
        assert_eq!(set.iter().collect::<Vec<_>>(), [0, 2, 64, 1023]);
        assert_eq!(set.count(), 4);
        assert!(!set.contains(5000));
    }

    #[test]
    fn a_kernel_that_claims_too_many_statistics_is_not_believed() {
        assert_eq!(valid(1_000_000, &[1, 2, 3]), [1, 2, 3]);
        assert_eq!(valid(-1, &[1, 2, 3]), [0u64; 0]);
    }
}
