//! Files and guest memory, without a copy in between.

use super::GuestMemory;
use crate::error::Error;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// Pieces of guest memory that one call of the host transfers at most.
const BATCH: usize = 32;

impl GuestMemory {
    /// Reads `len` bytes of a file straight into guest memory. Returns how many
    /// there were before the end of the file.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidInput`] where the range is not guest memory;
    /// what the file says.
    pub fn read_from_file(&self, file: &File, offset: u64, gpa: u64, len: u64) -> io::Result<u64> {
        self.transfer(offset, gpa, len, |p, n, off| {
            // SAFETY: `transfer` passes ranges of mapped guest memory; the
            // kernel writes them as the guest itself might.
            unsafe { libc::pread(file.as_raw_fd(), p.cast(), n, off) }
        })
    }

    /// Writes `len` bytes of guest memory straight to a file. Returns how many
    /// it took.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidInput`] where the range is not guest memory;
    /// what the file says.
    pub fn write_to_file(&self, file: &File, offset: u64, gpa: u64, len: u64) -> io::Result<u64> {
        self.transfer(offset, gpa, len, |p, n, off| {
            // SAFETY: `transfer` passes ranges of mapped guest memory, which
            // the kernel only reads.
            unsafe { libc::pwrite(file.as_raw_fd(), p.cast_const().cast(), n, off) }
        })
    }

    /// Reads from a file straight into pieces of guest memory, (address,
    /// bytes), in as few calls as the host allows. Returns how many bytes there
    /// were before the end of the file.
    ///
    /// # Errors
    /// As for [`GuestMemory::read_from_file`]; some pieces may be filled.
    pub fn read_from_file_vectored(
        &self,
        file: &File,
        offset: u64,
        pieces: impl IntoIterator<Item = (u64, u32)>,
    ) -> io::Result<u64> {
        self.transfer_vectored(offset, pieces, |v, n, off| {
            // SAFETY: `transfer_vectored` passes `n` ranges of mapped guest
            // memory; the kernel writes them as the guest itself might.
            unsafe { libc::preadv(file.as_raw_fd(), v, n, off) }
        })
    }

    /// As [`GuestMemory::read_from_file_vectored`], but only what the host has
    /// in memory: nothing is waited for.
    ///
    /// # Errors
    /// EAGAIN where all of it would have to be waited for; EOPNOTSUPP where
    /// file or host cannot tell; some pieces may be filled.
    #[cfg(target_os = "linux")]
    pub fn read_cached(
        &self,
        file: &File,
        offset: u64,
        pieces: impl IntoIterator<Item = (u64, u32)>,
    ) -> io::Result<u64> {
        self.transfer_vectored(offset, pieces, |v, n, off| {
            // SAFETY: `transfer_vectored` passes `n` ranges of mapped guest
            // memory; the kernel writes them as the guest itself might. The
            // offset's high half is of no use where a register has 64 bits.
            unsafe {
                libc::syscall(
                    libc::SYS_preadv2,
                    file.as_raw_fd(),
                    v,
                    n,
                    off,
                    0,
                    libc::RWF_NOWAIT,
                ) as isize
            }
        })
    }

    /// There is no such call.
    ///
    /// # Errors
    /// EOPNOTSUPP.
    #[cfg(not(target_os = "linux"))]
    pub fn read_cached(
        &self,
        _: &File,
        _: u64,
        _: impl IntoIterator<Item = (u64, u32)>,
    ) -> io::Result<u64> {
        Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP))
    }

    /// Writes pieces of guest memory, (address, bytes), straight to a file.
    /// Returns how many bytes it took.
    ///
    /// # Errors
    /// As for [`GuestMemory::write_to_file`]; some pieces may be written.
    pub fn write_to_file_vectored(
        &self,
        file: &File,
        offset: u64,
        pieces: impl IntoIterator<Item = (u64, u32)>,
    ) -> io::Result<u64> {
        self.transfer_vectored(offset, pieces, |v, n, off| {
            // SAFETY: `transfer_vectored` passes `n` ranges of mapped guest
            // memory, which the kernel only reads.
            unsafe { libc::pwritev(file.as_raw_fd(), v, n, off) }
        })
    }

    fn transfer_vectored(
        &self,
        mut offset: u64,
        pieces: impl IntoIterator<Item = (u64, u32)>,
        call: impl Fn(*const libc::iovec, i32, libc::off_t) -> isize,
    ) -> io::Result<u64> {
        let mut pieces = pieces.into_iter().peekable();
        let mut total = 0;
        while pieces.peek().is_some() {
            let mut iov = [libc::iovec {
                iov_base: std::ptr::null_mut(),
                iov_len: 0,
            }; BATCH];
            let mut n = 0;
            while n < BATCH
                && let Some((gpa, len)) = pieces.next()
            {
                let len = len as usize;
                let at = self
                    .offset(gpa, len)
                    .map_err(|e| io::Error::new(io::ErrorKind::InvalidInput, e))?;
                // SAFETY: [at, at + len) was just checked to be guest memory.
                let base = unsafe { self.map.base.add(at) };
                iov[n] = libc::iovec {
                    iov_base: base.cast(),
                    iov_len: len,
                };
                n += 1;
            }
            let mut batch = &mut iov[..n];
            while !batch.is_empty() {
                let off = libc::off_t::try_from(offset)
                    .map_err(|_| io::Error::from_raw_os_error(libc::EOVERFLOW))?;
                let mut done = match call(batch.as_ptr(), batch.len() as i32, off) {
                    0 if batch.iter().any(|v| v.iov_len > 0) => return Ok(total),
                    n if n >= 0 => n as usize,
                    _ => {
                        let e = io::Error::last_os_error();
                        if e.kind() != io::ErrorKind::Interrupted {
                            return Err(e);
                        }
                        continue;
                    }
                };
                offset += done as u64;
                total += done as u64;
                // What a short transfer leaves is the next one's.
                while let Some(first) = batch.first_mut() {
                    if done < first.iov_len {
                        // SAFETY: still inside the piece, which was checked.
                        first.iov_base = unsafe { first.iov_base.cast::<u8>().add(done) }.cast();
                        first.iov_len -= done;
                        break;
                    }
                    done -= first.iov_len;
                    batch = &mut batch[1..];
                }
            }
        }
        Ok(total)
    }

    fn transfer(
        &self,
        offset: u64,
        gpa: u64,
        len: u64,
        call: impl Fn(*mut u8, usize, libc::off_t) -> isize,
    ) -> io::Result<u64> {
        let invalid = |e: Error| io::Error::new(io::ErrorKind::InvalidInput, e);
        let at = self
            .offset(gpa, usize::try_from(len).unwrap_or(usize::MAX))
            .map_err(invalid)?;
        let mut done = 0u64;
        while done < len {
            let off = offset
                .checked_add(done)
                .and_then(|o| libc::off_t::try_from(o).ok());
            let off = off.ok_or_else(|| io::Error::from_raw_os_error(libc::EOVERFLOW))?;
            // SAFETY: `done` is below `len`, and [at, at + len) was checked.
            let p = unsafe { self.map.base.add(at + done as usize) };
            match call(p, (len - done) as usize, off) {
                0 => break,
                n if n > 0 => done += n as u64,
                _ => {
                    let e = io::Error::last_os_error();
                    if e.kind() != io::ErrorKind::Interrupted {
                        return Err(e);
                    }
                }
            }
        }
        Ok(done)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_go_straight_into_and_out_of_guest_memory() {
        let path = std::env::temp_dir().join(format!("vmmapi-test-{}", std::process::id()));
        let content: Vec<u8> = (0..10_000u32).map(|i| i as u8).collect();
        std::fs::write(&path, &content).unwrap();
        let file = File::options().read(true).write(true).open(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let m = GuestMemory::anonymous(1 << 20).unwrap();
        assert_eq!(m.read_from_file(&file, 100, 0x2001, 5000).unwrap(), 5000);
        let mut back = vec![0; 5000];
        m.read_bytes(0x2001, &mut back).unwrap();
        assert_eq!(back, content[100..5100]);
        // The file ends first.
        assert_eq!(m.read_from_file(&file, 9_000, 0, 5000).unwrap(), 1000);
        // The memory ends first.
        let e = m.read_from_file(&file, 0, (1 << 20) - 10, 11).unwrap_err();
        assert_eq!(e.kind(), io::ErrorKind::InvalidInput);
        assert_eq!(m.write_to_file(&file, 0, 0x2001, 10).unwrap(), 10);
        m.read_from_file(&file, 0, 0, 10).unwrap();
        m.read_bytes(0, &mut back[..10]).unwrap();
        assert_eq!(back[..10], content[100..110]);
    }

    #[test]
    fn pieces_are_one_stretch_of_a_file() {
        let path = std::env::temp_dir().join(format!("vmmapi-pieces-{}", std::process::id()));
        let content: Vec<u8> = (0..100_000u32).map(|i| (i ^ i >> 8) as u8).collect();
        std::fs::write(&path, &content).unwrap();
        let file = File::options().read(true).write(true).open(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let m = GuestMemory::anonymous(1 << 20).unwrap();
        // More than one batch, backwards, of odd sizes.
        let pieces: Vec<(u64, u32)> = (0..70u32)
            .map(|i| (0x80000 - 0x1000 * u64::from(i), 1000 + i))
            .collect();
        let total: u64 = pieces.iter().map(|p| u64::from(p.1)).sum();
        let n = m.read_from_file_vectored(&file, 11, pieces.iter().copied());
        assert_eq!(n.unwrap(), total);
        let mut at = 11;
        for &(gpa, len) in &pieces {
            let mut back = vec![0; len as usize];
            m.read_bytes(gpa, &mut back).unwrap();
            assert_eq!(back, content[at..at + len as usize]);
            at += len as usize;
        }
        let out = m.write_to_file_vectored(&file, 50_001, pieces.iter().copied().take(40));
        let wrote: usize = pieces.iter().take(40).map(|p| p.1 as usize).sum();
        assert_eq!(out.unwrap(), wrote as u64);
        m.read_from_file(&file, 50_001, 0x90000, wrote as u64)
            .unwrap();
        let mut back = vec![0; wrote];
        m.read_bytes(0x90000, &mut back).unwrap();
        assert_eq!(back, content[11..11 + wrote]);
        // The file ends first; the memory ends first.
        let end = m.read_from_file_vectored(&file, 99_000, [(0, 600), (0x1000, 600)]);
        assert_eq!(end.unwrap(), 1000);
        let e = m.read_from_file_vectored(&file, 0, [(0, 8), ((1 << 20) - 1, 2)]);
        assert_eq!(e.unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }
}
