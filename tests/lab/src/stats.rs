//! What `bhyvectl --get-stats` says: one statistic a line, its name in FreeBSD's
//! words, blanks, its value.

use std::collections::BTreeMap;

/// A VM's statistics by name, summed over its vCPUs.
pub type Stats = BTreeMap<String, u64>;

/// Reads the listing; lines that are not a name and a number are left out.
pub fn parse(text: &str) -> Stats {
    let mut stats = Stats::new();
    for line in text.lines() {
        let Some((name, value)) = line.trim_end().rsplit_once([' ', '\t']) else {
            continue;
        };
        let Ok(value) = value.parse::<u64>() else {
            continue;
        };
        *stats.entry(name.trim().to_owned()).or_default() += value;
    }
    stats
}

/// The statistics that count exits by reason.
pub fn exits(stats: &Stats) -> Stats {
    stats
        .iter()
        .filter(|(name, _)| {
            let name = name.to_lowercase();
            name.contains("exits") || name.contains("intercept")
        })
        .map(|(name, count)| (name.clone(), *count))
        .collect()
}

/// The number of exits that userland handled, where the listing has it.
pub fn userland_exits(stats: &Stats) -> Option<u64> {
    stats
        .iter()
        .find(|(name, _)| name.contains("handled in userspace"))
        .map(|(_, count)| *count)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn freebsd_words() {
        let stats = parse(
            "vcpu0 stats:\n\
             number of vm exits handled in userspace \t7\n\
             total number of vm exits                \t100\n\
             vcpu1 stats:\n\
             total number of vm exits\t11\n\
             number of ticks vcpu was idle\t5\n",
        );
        assert_eq!(stats["total number of vm exits"], 111);
        assert_eq!(userland_exits(&stats), Some(7));
        assert_eq!(exits(&stats).len(), 2);
    }
}
