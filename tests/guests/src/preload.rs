//! The list of preloaded files at `modulep`, read through KERNBASE as a FreeBSD
//! kernel reads it.

use crate::{KERNBASE, entry};

#[allow(missing_docs)]
pub mod kind {
    pub const NAME: u32 = 1;
    pub const TYPE: u32 = 2;
    pub const ADDR: u32 = 3;
    pub const SIZE: u32 = 4;
    pub const ARGS: u32 = 6;
    pub const ELFHDR: u32 = 0x8002;
    pub const SSYM: u32 = 0x8003;
    pub const ESYM: u32 = 0x8004;
    pub const ENVP: u32 = 0x8006;
    pub const HOWTO: u32 = 0x8007;
    pub const KERNEND: u32 = 0x8008;
    pub const SHDR: u32 = 0x8009;
    pub const SMAP: u32 = 0x9001;
}

/// Guest memory by physical address.
pub fn bytes(address: u64, length: u64) -> &'static [u8] {
    // SAFETY: the loader's page tables and ours map the first GiB at KERNBASE, and
    // nobody writes what the loader left there.
    unsafe { core::slice::from_raw_parts((KERNBASE + address) as *const u8, length as usize) }
}

/// One record.
#[derive(Debug, Clone, Copy)]
pub struct Record {
    /// Its type.
    pub kind: u32,
    /// Its contents.
    pub data: &'static [u8],
}

impl Record {
    /// The first 8 bytes as a number, or the first 4 where there are only 4.
    pub fn word(&self) -> u64 {
        let mut word = [0; 8];
        for (to, from) in word.iter_mut().zip(self.data) {
            *to = *from;
        }
        u64::from_le_bytes(word)
    }

    /// The contents as a string without its NUL.
    pub fn text(&self) -> &'static str {
        match self.data.split_last() {
            Some((0, text)) => core::str::from_utf8(text).unwrap_or("(not text)"),
            _ => "(no NUL)",
        }
    }
}

/// Walks the records from an address.
#[derive(Debug, Clone)]
pub struct Records {
    at: u64,
}

/// All records.
pub fn records() -> Records {
    Records {
        at: u64::from(entry::state().modulep),
    }
}

impl Records {
    /// Where the walk is: after its end, the end record.
    pub fn position(&self) -> u64 {
        self.at
    }
}

impl Iterator for Records {
    type Item = Record;

    fn next(&mut self) -> Option<Record> {
        let header = bytes(self.at, 8);
        let kind = u32::from_le_bytes([header[0], header[1], header[2], header[3]]);
        let size = u32::from_le_bytes([header[4], header[5], header[6], header[7]]);
        if kind == 0 && size == 0 {
            return None;
        }
        let data = bytes(self.at + 8, u64::from(size));
        self.at = (self.at + 8 + u64::from(size)).next_multiple_of(8);
        Some(Record { kind, data })
    }
}

/// The record of a kind that belongs to file number `file`.
pub fn find(file: usize, kind: u32) -> Option<Record> {
    let mut current = None;
    for record in records() {
        if record.kind == self::kind::NAME {
            current = Some(current.map_or(0, |n: usize| n + 1));
        }
        if current == Some(file) && record.kind == kind {
            return Some(record);
        }
    }
    None
}

/// How many files there are.
pub fn files() -> usize {
    records().filter(|r| r.kind == kind::NAME).count()
}

/// The `name=value` strings of the environment.
pub fn environment() -> impl Iterator<Item = &'static str> {
    let mut at = find(0, kind::ENVP).map_or(0, |r| r.word());
    core::iter::from_fn(move || {
        let mut end = at;
        while at != 0 && bytes(end, 1)[0] != 0 {
            end += 1;
        }
        if end == at {
            return None;
        }
        let text = core::str::from_utf8(bytes(at, end - at)).unwrap_or("(not text)");
        at = end + 1;
        Some(text)
    })
}

/// The value of a variable.
pub fn variable(name: &str) -> Option<&'static str> {
    environment().find_map(|text| text.strip_prefix(name)?.strip_prefix('='))
}
