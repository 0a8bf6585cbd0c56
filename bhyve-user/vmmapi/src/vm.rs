//! A VM: what is asked of it as a whole.

mod devices;
mod memory;

use crate::error::{Error, Result};
use crate::sys::{self, CTL, Plain};
use crate::vcpu::Vcpu;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};
use vmm_abi::layout::*;
use vmm_abi::limits::{MAX_VM_STATS, VM_MAX_NAMELEN};
use vmm_abi::names::{CpusetWhich, SuspendHow};
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

/// For limiting what the descriptor is good for; requests go through [`Vm`].
impl AsFd for Vm {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd()
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

    /// What a `vmm.ko` without our additions does without, for people: empty
    /// where it has them all.
    pub fn lacking(&self) -> Vec<&'static str> {
        [
            (EXT_F_RUN, "an IN that userland answers takes two calls"),
            (
                EXT_F_CONSTANT_PORT,
                "a port that is polled asks userland each time",
            ),
            (EXT_F_RUN_PAGE, "each exit is copied out of the kernel"),
            (
                EXT_F_RELEASE,
                "guest memory that a balloon gives back stays with the VM",
            ),
        ]
        .into_iter()
        .filter(|(feature, _)| !self.has(*feature))
        .map(|(_, what)| what)
        .collect()
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

    /// Offers the guest the paravirtual interface that KVM's guests know, all
    /// that the kernel piece has of it, or none. FreeBSD's own has none.
    ///
    /// # Errors
    /// ENXIO once the VM is destroyed.
    pub fn set_pv(&self, on: bool) -> Result<()> {
        if !self.has(EXT_F_PV) {
            return Ok(());
        }
        let mut arg = VmExtPv {
            features: if on { u32::MAX } else { 0 },
            ..VmExtPv::default()
        };
        self.request(VM_EXT_PV, &mut arg)
    }

    /// Gives the guest's TSC a frequency from its first run on, and offers it the
    /// paravirtual interface as [`Vm::set_pv`] does. False where the CPU cannot scale
    /// it so, or the kernel piece is FreeBSD's own.
    ///
    /// # Errors
    /// EBUSY once vCPUs are active.
    pub fn set_tsc(&self, pv: bool, khz: u32) -> Result<bool> {
        if !self.has(EXT_F_TSC) {
            return Ok(false);
        }
        let mut arg = VmExtPv {
            features: if pv { u32::MAX } else { 0 },
            tsc_khz: khz,
        };
        match self.request(VM_EXT_PV, &mut arg) {
            Ok(()) => Ok(true),
            Err(e) if e.errno() == Some(libc::EOPNOTSUPP) => Ok(false),
            Err(e) => Err(e),
        }
    }

    /// Makes two-byte OUTs (of `value`, or of any) to a port complete in the
    /// kernel and signal `fd` (an eventfd; on FreeBSD the event EVFILT_USER 0 of a
    /// kqueue of this process), or ends that (`None`). False where the kernel piece
    /// cannot: then each is an exit.
    ///
    /// # Errors
    /// EINVAL where `fd` is none such; ENOSPC where there are too many.
    pub fn set_doorbell(
        &self,
        port: u16,
        value: Option<u16>,
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<bool> {
        if !self.has(EXT_F_DOORBELL) {
            return Ok(false);
        }
        let on = if fd.is_some() { DOORBELL_ON } else { 0 };
        let only = if value.is_some() { DOORBELL_VALUE } else { 0 };
        let mut arg = VmExtDoorbell {
            port,
            value: value.unwrap_or(0),
            flags: on | only,
            fd: fd.map_or(-1, |fd| fd.as_raw_fd()),
            ..VmExtDoorbell::default()
        };
        self.request(VM_EXT_DOORBELL, &mut arg).map(|()| true)
    }

    /// Gives the host the memory in a range back, as far as it goes: what the
    /// host has in pieces of 2 MiB goes as a whole. Whoever touches the range
    /// later finds zeroes. Returns the bytes.
    ///
    /// # Errors
    /// ENOTTY where the kernel piece cannot; EINVAL for what is not system
    /// memory in whole pages; EBUSY for wired memory.
    pub fn release_memory(&self, gpa: u64, len: u64) -> Result<u64> {
        let mut arg = VmExtRelease {
            gpa,
            len,
            released: 0,
        };
        self.request(VM_EXT_RELEASE, &mut arg)?;
        Ok(arg.released)
    }

    /// The same for all handles on a VM that were made from each other.
    pub(crate) fn identity(&self) -> usize {
        Arc::as_ptr(&self.inner) as usize
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

    // ---- underneath ------------------------------------------------------

    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.inner.dev.as_fd()
    }

    /// The requests of a VM's device, those that run vCPUs first: for a program
    /// that limits its own descriptor.
    #[must_use]
    pub fn requests() -> Vec<u32> {
        let first = [VM_EXT_RUN_PAGE, VM_RUN];
        let not = [VMMCTL_VM_CREATE, VMMCTL_VM_DESTROY];
        let others = ALL.iter().map(|(request, _)| *request);
        let others = others.filter(|r| !first.contains(r) && !not.contains(r));
        first.into_iter().chain(others).collect()
    }

    /// Opens the control device for good, so that VMs can be made and destroyed
    /// by a process that may not open it any more.
    ///
    /// # Errors
    /// There is none (FreeBSD's own vmm.ko before 15), or it cannot be opened.
    pub fn keep_control() -> io::Result<()> {
        let ctl = sys::open(CTL)?;
        // Another thread's is as good.
        let _ = KEPT.set(ctl);
        Ok(())
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

/// See [`Vm::keep_control`].
static KEPT: OnceLock<File> = OnceLock::new();

/// Makes or destroys a VM: by the control device, or on FreeBSD before 15 by a
/// sysctl.
fn control(name: &str, request: u32, sysctl: &str) -> std::result::Result<(), Control> {
    let opened;
    let ctl = match KEPT.get().map_or_else(|| Err(sys::open(CTL)), Ok) {
        Ok(kept) => kept,
        Err(Ok(ctl)) => {
            opened = ctl;
            &opened
        }
        Err(Err(e)) if e.kind() == io::ErrorKind::NotFound && cfg!(target_os = "freebsd") => {
            return sys::sysctl_write(sysctl, name).map_err(Control::Refused);
        }
        Err(Err(e)) => return Err(Control::Open(e)),
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
