//! The system calls. Everything `unsafe` about requests is here.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64};
use vmm_abi::ioccom;
use vmm_abi::layout::*;
use zerocopy::{FromBytes, IntoBytes};

/// The control device.
pub(crate) const CTL: &str = "/dev/vmmctl";

/// Structures whose fields the kernel never takes for an address of this
/// process, so that passing any value of them is sound.
pub(crate) trait Plain: FromBytes + IntoBytes {}

macro_rules! plain {
    ($($t:ty)*) => { $(impl Plain for $t {})* };
}

plain! {
    VmMemmap VmMunmap VmMemseg VmRegister VmSegDesc VmRun VmException VmLapicMsi VmLapicIrq
    VmIoapicIrq VmIsaIrq VmIsaIrqTrigger VmCapability VmPptdev VmPptdevMmio VmPptdevMsi
    VmPptdevMsix VmNmi VmStats VmStats14 VmStatDesc VmX2apic VmGpaPte VmHpetCap VmSuspend
    VmGla2gpa VmActivateCpu VmIntinfo VmRtcTime VmRtcData VmCpuTopology VmKernemuDev VmmctlVm
    VmExtVersion VmExtRun VmExtConstantPort VmExtOutRing VmExtDoorbell VmExtRelease VmExtPv i32 u32 [u8; 32]
}

/// Opens a device for reading and writing.
pub(crate) fn open(path: &str) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).open(path)
}

/// A request with a plain argument.
pub(crate) fn ioctl<T: Plain>(fd: BorrowedFd<'_>, request: u32, arg: &mut T) -> io::Result<()> {
    assert_eq!(ioccom::ioc_len(request), size_of::<T>());
    // SAFETY: the request's length field is the size of `T`, so the kernel
    // copies exactly `arg`; `T` is plain, so any bytes are valid in both
    // directions and no field of it is an address of this process.
    unsafe { ioctl_raw(fd, request, std::ptr::from_mut(arg).cast()) }
}

/// A request whose argument is a number.
#[inline]
pub(crate) fn ioctl_int(fd: BorrowedFd<'_>, request: u32, arg: i32) -> io::Result<()> {
    debug_assert_eq!(request & !0xffff, ioccom::iowint(0, 0));
    // SAFETY: the request passes its argument by value; the kernel follows no
    // address.
    let r = unsafe { libc::ioctl(fd.as_raw_fd(), request as _, arg) };
    if r < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// lseek(2) with SEEK_DATA.
#[inline]
pub(crate) fn seek_data(fd: BorrowedFd<'_>, offset: u64) -> io::Result<()> {
    // SAFETY: takes numbers only.
    let r = unsafe { libc::lseek(fd.as_raw_fd(), offset as libc::off_t, libc::SEEK_DATA) };
    if r < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// A page of the kernel's that both sides write to.
#[derive(Debug)]
pub(crate) struct Page(NonNull<u8>);

// SAFETY: a mapping belongs to the process, and all access is atomic.
unsafe impl Send for Page {}
// SAFETY: as above.
unsafe impl Sync for Page {}

impl Page {
    pub(crate) const SIZE: usize = 4096;

    /// Maps the page at `offset` of a VM's device.
    pub(crate) fn map(fd: BorrowedFd<'_>, offset: u64) -> io::Result<Page> {
        let error = |code| io::Error::from_raw_os_error(code);
        let offset = libc::off_t::try_from(offset).map_err(|_| error(libc::EINVAL))?;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let p = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                Self::SIZE,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                fd.as_raw_fd(),
                offset,
            )
        };
        if p == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        NonNull::new(p.cast())
            .map(Page)
            .ok_or_else(|| error(libc::ENOMEM))
    }

    #[inline]
    fn at<T>(&self, offset: usize) -> *mut T {
        assert!(offset.is_multiple_of(size_of::<T>()) && offset + size_of::<T>() <= Self::SIZE);
        self.0.as_ptr().wrapping_add(offset).cast()
    }

    #[inline]
    pub(crate) fn word64(&self, offset: usize) -> &AtomicU64 {
        // SAFETY: aligned and within the page, which is mapped as long as
        // self lives and only accessed atomically.
        unsafe { AtomicU64::from_ptr(self.at(offset)) }
    }

    pub(crate) fn word(&self, offset: usize) -> &AtomicU32 {
        // SAFETY: as above.
        unsafe { AtomicU32::from_ptr(self.at(offset)) }
    }

    pub(crate) fn byte(&self, offset: usize) -> &AtomicU8 {
        // SAFETY: as above.
        unsafe { AtomicU8::from_ptr(self.at(offset)) }
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        // SAFETY: our own mapping, which nothing uses any more. Nothing can be
        // done about a failure.
        unsafe { libc::munmap(self.0.as_ptr().cast(), Self::SIZE) };
    }
}

/// A request without an argument.
pub(crate) fn ioctl_void(fd: BorrowedFd<'_>, request: u32) -> io::Result<()> {
    assert_eq!(ioccom::ioc_len(request), 0);
    // SAFETY: the request's length is zero, so the kernel copies nothing.
    unsafe { ioctl_raw(fd, request, std::ptr::null_mut()) }
}

/// Reads registers: `regvals[i]` becomes the value of register `regnums[i]`.
pub(crate) fn get_register_set(
    fd: BorrowedFd<'_>,
    cpuid: i32,
    regnums: &[i32],
    regvals: &mut [u64],
) -> io::Result<()> {
    let mut arg = register_set(cpuid, regnums, regvals.len(), regvals.as_mut_ptr() as u64)?;
    let arg = std::ptr::from_mut(&mut arg).cast();
    // SAFETY: both addresses are those of slices of `count` elements, borrowed
    // for the call, the one that the kernel writes mutably.
    unsafe { ioctl_raw(fd, vmm_abi::request::VM_GET_REGISTER_SET, arg) }
}

/// Sets registers.
pub(crate) fn set_register_set(
    fd: BorrowedFd<'_>,
    cpuid: i32,
    regnums: &[i32],
    regvals: &[u64],
) -> io::Result<()> {
    let mut arg = register_set(cpuid, regnums, regvals.len(), regvals.as_ptr() as u64)?;
    let arg = std::ptr::from_mut(&mut arg).cast();
    // SAFETY: both addresses are those of slices of `count` elements, borrowed
    // for the call; the kernel only reads them.
    unsafe { ioctl_raw(fd, vmm_abi::request::VM_SET_REGISTER_SET, arg) }
}

fn register_set(
    cpuid: i32,
    regnums: &[i32],
    values: usize,
    regvals: u64,
) -> io::Result<VmRegisterSet> {
    assert_eq!(regnums.len(), values);
    let count = u32::try_from(values).map_err(|_| io::Error::from_raw_os_error(libc::E2BIG))?;
    Ok(VmRegisterSet {
        cpuid,
        count,
        regnums: regnums.as_ptr() as u64,
        regvals,
    })
}

/// Fills `bits` with a set of vCPUs.
pub(crate) fn get_cpus(fd: BorrowedFd<'_>, which: i32, bits: &mut [u64]) -> io::Result<()> {
    let mut arg = VmCpuset {
        which,
        cpusetsize: i32::try_from(size_of_val(bits))
            .map_err(|_| io::Error::from_raw_os_error(libc::ERANGE))?,
        cpus: bits.as_mut_ptr() as u64,
    };
    let arg = std::ptr::from_mut(&mut arg).cast();
    // SAFETY: `cpus` is the address of `cpusetsize` bytes, borrowed mutably for
    // the call.
    unsafe { ioctl_raw(fd, vmm_abi::request::VM_GET_CPUS, arg) }
}

/// # Safety
/// `arg` must be what `request` takes, and addresses inside it must be valid
/// for what the kernel does with them.
unsafe fn ioctl_raw(fd: BorrowedFd<'_>, request: u32, arg: *mut libc::c_void) -> io::Result<()> {
    // SAFETY: by this function's own contract. The request's 32 bits are the
    // same on both hosts; only the type of the parameter differs.
    let r = unsafe { libc::ioctl(fd.as_raw_fd(), request as _, arg) };
    if r < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Repeats a request that a signal interrupted.
pub(crate) fn retry(mut request: impl FnMut() -> io::Result<()>) -> io::Result<()> {
    loop {
        match request() {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            done => return done,
        }
    }
}

/// Writes a string to `hw.vmm.create` or `hw.vmm.destroy`, how FreeBSD before
/// 15 makes and destroys VMs.
#[cfg(target_os = "freebsd")]
pub(crate) fn sysctl_write(name: &str, value: &str) -> io::Result<()> {
    let name = std::ffi::CString::new(name)?;
    // SAFETY: `name` is NUL-terminated and `value` readable for its length; no
    // old value is asked for.
    let r = unsafe {
        libc::sysctlbyname(
            name.as_ptr(),
            std::ptr::null_mut(),
            std::ptr::null_mut(),
            value.as_ptr().cast(),
            value.len(),
        )
    };
    if r < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// There is only the control device elsewhere.
#[cfg(not(target_os = "freebsd"))]
pub(crate) fn sysctl_write(_name: &str, _value: &str) -> io::Result<()> {
    Err(io::Error::from_raw_os_error(libc::ENOENT))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    /// A device without ioctls answers ENOTTY to what reaches it; anything else
    /// would mean that the host's generic file layer takes the number.
    #[test]
    fn no_request_is_taken_by_the_generic_file_layer() {
        let null = open("/dev/null").unwrap();
        let mut arg = [0u64; 128];
        for &(request, name) in vmm_abi::request::ALL {
            assert!(ioccom::ioc_len(request) <= size_of_val(&arg));
            // SAFETY: `arg` is longer than any argument, and all zero, so the
            // addresses in it are null.
            let r = unsafe { ioctl_raw(null.as_fd(), request, arg.as_mut_ptr().cast()) };
            assert_eq!(r.unwrap_err().raw_os_error(), Some(libc::ENOTTY), "{name}");
        }
    }
}
