//! Memory sizes as bhyve(8) takes them.

/// Bytes of `-m`'s argument: a plain number below 1 MiB means MiB; suffixes k, m,
/// g and t (and K, M, G, T) multiply by powers of 1024.
///
/// # Errors
/// The reason why it is no memory size.
pub fn parse(text: &str) -> Result<u64, String> {
    const MIB: u64 = 1 << 20;
    let bad = || format!("invalid memory size '{text}': give a number and one of k, m, g, t");
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let number: u64 = digits.parse().map_err(|_| bad())?;
    let shift = match text[digits.len()..].to_ascii_lowercase().as_str() {
        "" if number < MIB => 20,
        "" | "b" => 0,
        "k" => 10,
        "m" => 20,
        "g" => 30,
        "t" => 40,
        _ => return Err(bad()),
    };
    let bytes = number.checked_mul(1 << shift).ok_or_else(bad)?;
    if bytes < 2 * MIB || bytes % MIB != 0 {
        return Err(format!(
            "invalid memory size '{text}': it must be whole MiB, and at least 2"
        ));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::parse;

    #[test]
    fn sizes_are_read_as_bhyve_reads_them() {
        for (text, bytes) in [
            ("256", 256 << 20),
            ("256M", 256 << 20),
            ("256m", 256 << 20),
            ("1g", 1 << 30),
            ("2048k", 2 << 20),
            ("268435456", 256 << 20),
            ("1T", 1 << 40),
        ] {
            assert_eq!(parse(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn nonsense_is_refused() {
        for text in [
            "",
            "m",
            "-1m",
            "1x",
            "1mm",
            "99999999999999t",
            "1m",
            "0",
            "2049k",
            "é",
        ] {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
