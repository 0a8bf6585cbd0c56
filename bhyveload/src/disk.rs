//! Disk images: bytes at offsets, and what is wrong with them.
//!
//! Everything that interprets an image works on [`ReadAt`] alone, so that each
//! partition scheme and each file system can be tested and fuzzed in memory.

pub mod file;
pub mod format;

use crate::error::LoadError;
use std::fmt;

/// Why something on an image cannot be read: a field by its name in the
/// format's description, what is wrong with it, and the way out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// The field or structure.
    pub field: String,
    /// What is wrong.
    pub problem: String,
    /// What the user can do, where that is known.
    pub hint: Option<String>,
}

impl Fault {
    /// A fault of `field`.
    pub fn new(field: impl Into<String>, problem: impl Into<String>) -> Self {
        Self {
            field: field.into(),
            problem: problem.into(),
            hint: None,
        }
    }

    /// The same fault with advice.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// The error that a user sees: the fault, and whose it is.
    #[must_use]
    pub fn of(self, file: impl Into<String>) -> LoadError {
        LoadError {
            file: file.into(),
            field: self.field,
            problem: self.problem,
            hint: self.hint,
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.field, self.problem)
    }
}

impl std::error::Error for Fault {}

/// The result of reading something from an image.
pub type Read<T> = Result<T, Fault>;

/// Bytes at offsets: an image, a partition of one, or memory.
pub trait ReadAt {
    /// Bytes that there are.
    fn size(&self) -> u64;

    /// Fills `buffer` from `offset` on.
    ///
    /// # Errors
    /// The range is not all there, or the host cannot read it.
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Read<()>;
}

/// The error for a range that is not all there.
#[must_use]
pub fn outside(offset: u64, len: usize, size: u64) -> Fault {
    Fault::new(
        "image",
        format!("{len} bytes at offset {offset:#x} lie outside its {size:#x} bytes"),
    )
    .hint("the image is truncated or damaged")
}

impl ReadAt for [u8] {
    fn size(&self) -> u64 {
        self.len() as u64
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Read<()> {
        let bytes = usize::try_from(offset)
            .ok()
            .and_then(|start| self.get(start..start.checked_add(buffer.len())?))
            .ok_or_else(|| outside(offset, buffer.len(), self.size()))?;
        buffer.copy_from_slice(bytes);
        Ok(())
    }
}

impl ReadAt for Vec<u8> {
    fn size(&self) -> u64 {
        self.as_slice().size()
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Read<()> {
        self.as_slice().read_at(offset, buffer)
    }
}

impl<T: ReadAt + ?Sized> ReadAt for &T {
    fn size(&self) -> u64 {
        (**self).size()
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Read<()> {
        (**self).read_at(offset, buffer)
    }
}

impl<T: ReadAt + ?Sized> ReadAt for std::rc::Rc<T> {
    fn size(&self) -> u64 {
        (**self).size()
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Read<()> {
        (**self).read_at(offset, buffer)
    }
}

/// A part of something, such as a partition of a disk.
#[derive(Debug, Clone)]
pub struct Window<R> {
    inner: R,
    start: u64,
    size: u64,
}

impl<R: ReadAt> Window<R> {
    /// `size` bytes of `inner` from `start` on, as far as they are there.
    pub fn new(inner: R, start: u64, size: u64) -> Self {
        let size = size.min(inner.size().saturating_sub(start));
        Self { inner, start, size }
    }
}

impl<R: ReadAt> ReadAt for Window<R> {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Read<()> {
        let end = offset.checked_add(buffer.len() as u64);
        match (end, self.start.checked_add(offset)) {
            (Some(end), Some(at)) if end <= self.size => self.inner.read_at(at, buffer),
            _ => Err(outside(offset, buffer.len(), self.size)),
        }
    }
}

/// The `N` bytes at `offset`.
///
/// # Errors
/// As [`ReadAt::read_at`].
pub fn array<const N: usize>(image: &(impl ReadAt + ?Sized), offset: u64) -> Read<[u8; N]> {
    let mut bytes = [0; N];
    image.read_at(offset, &mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_window_shows_its_part_and_nothing_else() {
        let disk: Vec<u8> = (0..100).collect();
        let part = Window::new(&disk, 10, 20);
        assert_eq!(array::<2>(&part, 18).unwrap(), [28, 29]);
        for (offset, len) in [(19, 2), (20, 1), (u64::MAX, 1), (u64::MAX - 5, 100)] {
            assert!(part.read_at(offset, &mut vec![0; len]).is_err(), "{offset}");
        }
        // A partition table may claim more than there is.
        assert_eq!(Window::new(&disk, 90, u64::MAX).size(), 10);
        assert_eq!(Window::new(&disk, u64::MAX, 5).size(), 0);
        assert!(array::<1>(&Window::new(&disk, u64::MAX, 5), 0).is_err());
    }
}
