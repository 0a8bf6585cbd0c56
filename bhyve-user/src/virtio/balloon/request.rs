//! What the guest wrote, and what comes in by the control socket.

use vmmapi::parse_memsize;

/// Bytes of a page in the balloon's reckoning, whatever the guest's pages are
/// (virtio 1.2 §5.5.6).
pub const PAGE: u64 = 4096;
/// Bytes of a statistic: tag and value, packed.
const STATISTIC: usize = 10;
/// Names of the statistics by their tags (§5.5.6.3), as `bhyvectl` shows them.
pub const NAMES: [&str; 10] = [
    "swap_in",
    "swap_out",
    "major_faults",
    "minor_faults",
    "free_memory",
    "total_memory",
    "available_memory",
    "disk_caches",
    "hugetlb_allocations",
    "hugetlb_failures",
];

/// Statistics by their tags; what the guest does not tell is `None`.
pub type Statistics = [Option<u64>; NAMES.len()];

/// Page numbers from a buffer of the inflate or deflate queue. What is left
/// of the last is ignored.
pub fn pages(bytes: &[u8]) -> impl Iterator<Item = u64> {
    let (numbers, _) = bytes.as_chunks::<4>();
    numbers.iter().map(|&n| u32::from_le_bytes(n).into())
}

/// Statistics from a buffer of their queue; unknown tags are ignored.
pub fn statistics(bytes: &[u8]) -> Statistics {
    let mut all = Statistics::default();
    let (entries, _) = bytes.as_chunks::<STATISTIC>();
    for [t0, t1, value @ ..] in entries {
        let tag = u16::from_le_bytes([*t0, *t1]);
        if let Some(slot) = all.get_mut(usize::from(tag)) {
            *slot = Some(u64::from_le_bytes(*value));
        }
    }
    all
}

/// What a line on the control socket asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// `size SIZE`: the balloon shall be that large, bytes.
    Size(u64),
    /// `stats`: how things are, after asking the guest.
    Stats,
}

/// Parses a line.
///
/// # Errors
/// What there is instead.
pub fn command(line: &str) -> Result<Command, String> {
    let mut words = line.split_whitespace();
    let command = match (words.next(), words.next(), words.next()) {
        (Some("stats"), None, None) => Some(Command::Stats),
        // Zero needs no unit.
        (Some("size"), Some("0"), None) => Some(Command::Size(0)),
        (Some("size"), Some(size), None) => parse_memsize(size).map(Command::Size),
        _ => None,
    };
    command.ok_or_else(|| format!("{line:?} is not understood; there is: size SIZE, stats"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_and_statistics_are_packed() {
        let numbers: Vec<u64> = pages(&[1, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 9]).collect();
        assert_eq!(numbers, [1, 0xffff_ffff]);
        let mut bytes = Vec::new();
        for (tag, value) in [(4_u16, 77_u64), (500, 1), (0, u64::MAX)] {
            bytes.extend(tag.to_le_bytes());
            bytes.extend(value.to_le_bytes());
        }
        let s = statistics(&bytes);
        assert_eq!((s[0], s[4], s[1]), (Some(u64::MAX), Some(77), None));
        assert_eq!(statistics(&bytes[..9]), Statistics::default());
    }

    #[test]
    fn commands_are_lines() {
        assert_eq!(command("size 64M"), Ok(Command::Size(64 << 20)));
        assert_eq!(command(" size 0 "), Ok(Command::Size(0)));
        assert_eq!(command("stats"), Ok(Command::Stats));
        for bad in ["", "size", "size x", "stats 1", "size 1 2"] {
            assert!(command(bad).unwrap_err().contains("there is"), "{bad}");
        }
    }
}
