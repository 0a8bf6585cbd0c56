//! Which of the host's CPUs a thread may run on.

use std::io;

/// Lets the calling thread run on these CPUs of the host only.
///
/// # Errors
/// `EINVAL` for a number that no host has, and what the host says (sched_setaffinity(2),
/// cpuset_setaffinity(2)).
pub fn pin_thread(cpus: &[usize]) -> io::Result<()> {
    let mut mask = [0u64; 16];
    for &cpu in cpus {
        let word = mask
            .get_mut(cpu / 64)
            .ok_or_else(|| io::Error::from_raw_os_error(libc::EINVAL))?;
        *word |= 1 << (cpu % 64);
    }
    set(&mask)
}

#[cfg(target_os = "linux")]
fn set(mask: &[u64; 16]) -> io::Result<()> {
    // SAFETY: the kernel reads as many bytes of `mask` as it is told of; 0 is
    // the calling thread.
    let r = unsafe { libc::sched_setaffinity(0, size_of_val(mask), mask.as_ptr().cast()) };
    if r < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// FreeBSD has sched_setaffinity(3) only from 13 on. A set that is larger than
/// the kernel's (256 CPUs in 12 and 13) is refused even if the rest is empty.
#[cfg(target_os = "freebsd")]
fn set(mask: &[u64; 16]) -> io::Result<()> {
    let used = mask.iter().rposition(|w| *w != 0).map_or(1, |i| i + 1);
    let bytes = if used <= 4 { 32 } else { size_of_val(mask) };
    // SAFETY: the kernel reads `bytes` bytes of `mask`, which has no fewer; -1
    // is the calling thread.
    let r = unsafe {
        libc::cpuset_setaffinity(
            libc::CPU_LEVEL_WHICH,
            libc::CPU_WHICH_TID,
            -1,
            bytes,
            mask.as_ptr().cast(),
        )
    };
    if r < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cpu_that_no_host_has_is_refused() {
        assert_eq!(
            pin_thread(&[5000]).unwrap_err().raw_os_error(),
            Some(libc::EINVAL)
        );
        // No CPU at all leaves nothing to run on.
        assert!(pin_thread(&[]).is_err());
    }
}
