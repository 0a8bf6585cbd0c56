//! Requests whose structure the host does not copy for us.

use core::mem::size_of;

use vmm_abi::layout::VmExtRelease;
use vmm_abi::request::VM_EXT_RELEASE;
use zerocopy::{FromBytes, IntoBytes};

use crate::errno;
use crate::ioctl;
use crate::os;
use crate::sync::try_slice_zeroed;
use crate::vm::Vm;

/// Requests up to this size are copied to the stack.
const SMALL: usize = 256;

/// FreeBSD's request encoding (sys/ioccom.h): the structure's length, and which
/// ways it goes.
const LEN_SHIFT: u32 = 16;
const LEN_MASK: u32 = 0x1fff;
const OUT: u32 = 0x4000_0000;
const IN: u32 = 0x8000_0000;

/// A request on a VM, or on the control device. Where it released memory of the
/// VM's, `unmap` is told from where to where in the file.
pub fn ioctl(
    vm: Option<&Vm>,
    cmd: u32,
    user: u64,
    unmap: impl FnOnce(i64, i64),
) -> Result<(), i32> {
    let len = (cmd >> LEN_SHIFT & LEN_MASK) as usize;
    // As aligned as any request.
    let mut small = [0_u128; SMALL / size_of::<u128>()];
    let mut large;
    let words = if len <= SMALL {
        &mut small[..]
    } else {
        // SAFETY: zero is a number.
        large = unsafe { try_slice_zeroed::<u128>(len.div_ceil(size_of::<u128>())) }
            .map_err(|_| errno::ENOMEM)?;
        &mut large[..]
    };
    let data = words.as_mut_bytes().get_mut(..len).ok_or(errno::EINVAL)?;
    if cmd & IN != 0 {
        os::copyin(user, data)?;
    }
    match vm {
        Some(vm) => ioctl::vm(vm, cmd, data)?,
        None => ioctl::ctl(cmd, data)?,
    }
    // Userland's mappings would keep the pages; they come back as needed.
    if cmd == VM_EXT_RELEASE
        && let Ok(a) = VmExtRelease::read_from_bytes(data)
    {
        unmap(a.gpa as i64, a.len as i64);
    }
    if cmd & OUT != 0 {
        os::copyout(data, user)?;
    }
    Ok(())
}
