//! Sizes on command lines.

/// A size in bytes from a command line, as libvmmapi's `vm_parse_memsize`: a
/// plain number below 1 Mi counts MiB, one above counts bytes; suffixes K, M,
/// G, T, upper or lower case, an optional B behind them.
pub fn parse_memsize(text: &str) -> Option<u64> {
    let lower = text.trim().to_ascii_lowercase();
    let digits_end = lower
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(lower.len());
    if let Some(hex) = lower.strip_prefix("0x") {
        return from_plain(u64::from_str_radix(hex, 16).ok()?);
    }
    let (digits, suffix) = lower.split_at(digits_end);
    let n: u64 = digits.parse().ok()?;
    let shift = match suffix.strip_suffix('b').unwrap_or(suffix) {
        "" if suffix.is_empty() => return from_plain(n),
        "" => 0,
        "k" => 10,
        "m" => 20,
        "g" => 30,
        "t" => 40,
        _ => return None,
    };
    n.checked_mul(1 << shift)
}

fn from_plain(n: u64) -> Option<u64> {
    if n < 1 << 20 {
        n.checked_mul(1 << 20)
    } else {
        Some(n)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_bhyve_reads_them() {
        let mib = 1u64 << 20;
        for (text, bytes) in [
            ("256", 256 * mib),
            ("256M", 256 * mib),
            ("256m", 256 * mib),
            ("1g", 1 << 30),
            ("2GB", 2 << 30),
            ("1048576", mib),
            ("64k", 64 << 10),
            ("0x200", 512 * mib),
        ] {
            assert_eq!(parse_memsize(text), Some(bytes), "{text}");
        }
        for bad in ["", "M", "1x", "-5", "99999999999T", "1.5G"] {
            assert_eq!(parse_memsize(bad), None, "{bad}");
        }
    }
}
