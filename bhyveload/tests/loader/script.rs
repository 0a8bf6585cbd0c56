//! A console that plays keys, and guests to load.

use bhyveload::cli::Cli;
use bhyveload::console::{Console, Key, harmless};
use bhyveload::error::LoadError;
use bhyveload::freebsd::FreeBsd;
use bhyveload::loader::Outcome;
use clap::Parser;
use std::collections::VecDeque;
use std::fs;
use std::path::Path;
use std::time::Duration;

/// What happens when somebody waits for a key.
#[derive(Clone, Copy)]
pub enum Event {
    Byte(u8),
    /// Nobody presses one in time.
    Timeout,
}

pub struct Script {
    events: VecDeque<Event>,
    pub terminal: bool,
    pub said: String,
    /// How long each wait for a key would have been at most.
    pub waits: Vec<Option<Duration>>,
}

impl Script {
    pub fn new(keys: &str) -> Self {
        Self {
            events: keys.bytes().map(Event::Byte).collect(),
            terminal: false,
            said: String::new(),
            waits: Vec::new(),
        }
    }

    /// Somebody sits there, and lets the first countdown pass if `patient`.
    pub fn terminal(keys: &str, patient: bool) -> Self {
        let mut script = Self::new(keys);
        script.terminal = true;
        if patient {
            script.events.push_front(Event::Timeout);
        }
        script
    }
}

impl Console for Script {
    fn print(&mut self, text: &str) -> Result<(), LoadError> {
        self.said.push_str(&harmless(text));
        assert!(self.said.len() < 10 << 20, "endless output");
        Ok(())
    }

    fn erase(&mut self) -> Result<(), LoadError> {
        self.said.pop();
        Ok(())
    }

    fn key(&mut self, wait: Option<Duration>) -> Result<Key, LoadError> {
        self.waits.push(wait);
        Ok(match self.events.pop_front() {
            Some(Event::Byte(byte)) => Key::Byte(byte),
            // Time passes in no time.
            Some(Event::Timeout) if wait.is_some_and(|w| !w.is_zero()) => {
                std::thread::sleep(wait.unwrap_or_default());
                Key::Timeout
            }
            Some(Event::Timeout) => Key::Timeout,
            None => Key::End,
        })
    }

    fn is_terminal(&self) -> bool {
        self.terminal
    }
}

pub const LIMIT: u64 = 64 << 20;

/// Runs bhyveload's loader with a command line.
pub fn load(line: &[&str], script: &mut Script) -> Result<Outcome, LoadError> {
    let words = ["bhyveload"].iter().chain(line).chain(&["vm"]);
    let cli = Cli::try_parse_from(words).unwrap();
    cli.check()?;
    cli.run_loader(script, LIMIT)
}

/// The guest that comes of it when nobody is there.
pub fn boot(line: &[&str]) -> (FreeBsd, String) {
    let mut script = Script::new("");
    match load(line, &mut script) {
        Ok(Outcome::Boot(boot)) => (*boot, script.said),
        other => panic!("{other:?}\n{}", script.said),
    }
}

/// A folder with these files.
pub fn folder(files: &[(&str, &[u8])]) -> tempfile::TempDir {
    let top = tempfile::tempdir().unwrap();
    for (path, data) in files {
        let path = top.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, data).unwrap();
    }
    top
}

pub fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// An ELF64 file of a type with nothing in it: a kernel or a module for the
/// loader's purposes, told apart by its last byte.
pub fn elf(kind: u16, mark: u8) -> Vec<u8> {
    let mut file = b"\x7fELF\x02\x01\x01\x09\0\0\0\0\0\0\0\0".to_vec();
    file.extend_from_slice(&kind.to_le_bytes());
    file.extend_from_slice(&62u16.to_le_bytes());
    file.extend_from_slice(&1u32.to_le_bytes());
    file.extend_from_slice(&[0; 28]);
    for v in [64u16, 56, 0, 64, 0, 0] {
        file.extend_from_slice(&v.to_le_bytes());
    }
    file.push(mark);
    file
}

/// A module as the compiler makes it: metadata through relocations.
/// `provides`: a module and its version; `depends`: a module and the versions that do.
pub fn kld(provides: &[(&str, u32)], depends: &[(&str, [u32; 3])]) -> Vec<u8> {
    // One data section with everything, its relocations, the set and its.
    let (mut data, mut set) = (Vec::new(), Vec::new());
    let (mut data_rela, mut set_rela) = (Vec::new(), Vec::new());
    let rela = |list: &mut Vec<u8>, at: usize, to: usize| {
        for v in [at as u64, (1 << 32) | 1, to as u64] {
            list.extend_from_slice(&v.to_le_bytes());
        }
    };
    let mut add = |kind: u32, name: &str, values: &[u32]| {
        let text = data.len();
        data.extend_from_slice(name.as_bytes());
        data.resize((data.len() + 1usize).next_multiple_of(8), 0);
        let value = data.len();
        for v in values {
            data.extend_from_slice(&v.to_le_bytes());
        }
        data.resize(data.len().next_multiple_of(8), 0);
        let record = data.len();
        data.extend_from_slice(&1u32.to_le_bytes());
        data.extend_from_slice(&kind.to_le_bytes());
        data.extend_from_slice(&[0; 16]);
        rela(&mut data_rela, record + 8, value);
        rela(&mut data_rela, record + 16, text);
        rela(&mut set_rela, set.len(), record);
        set.extend_from_slice(&[0; 8]);
    };
    for (name, version) in provides {
        add(3, name, &[*version]);
    }
    for (name, versions) in depends {
        add(1, name, versions);
    }
    // Symbol 1 is section 1's.
    let mut symbols = vec![0u8; 48];
    symbols[24 + 4] = 3;
    symbols[24 + 6] = 1;
    let names = b"\0.data\0set_modmetadata_set\0.x\0";
    let sections: [(u32, u32, &[u8], u32, u32); 6] = [
        (1, 1, &data, 0, 0),
        (7, 1, &set, 0, 0),
        (27, 4, &data_rela, 5, 1),
        (27, 4, &set_rela, 5, 2),
        (27, 2, &symbols, 6, 0),
        (27, 3, names, 0, 0),
    ];
    let mut file = elf(1, 0);
    file.resize(72, 0);
    let mut headers = vec![0u8; 64];
    for (name, kind, bytes, link, info) in sections {
        let at = file.len();
        file.extend_from_slice(bytes);
        file.resize(file.len().next_multiple_of(8), 0);
        for v in [name, kind] {
            headers.extend_from_slice(&v.to_le_bytes());
        }
        for v in [2, 0, at as u64, bytes.len() as u64] {
            headers.extend_from_slice(&v.to_le_bytes());
        }
        for v in [link, info] {
            headers.extend_from_slice(&v.to_le_bytes());
        }
        for v in [8u64, 24] {
            headers.extend_from_slice(&v.to_le_bytes());
        }
    }
    let table = file.len() as u64;
    file.extend_from_slice(&headers);
    file[40..48].copy_from_slice(&table.to_le_bytes());
    file[60..62].copy_from_slice(&7u16.to_le_bytes());
    file[62..64].copy_from_slice(&6u16.to_le_bytes());
    file
}

/// A `linker.hints`: module, version, file.
pub fn hints(list: &[(&str, u32, &str)]) -> Vec<u8> {
    let mut file = 1u32.to_le_bytes().to_vec();
    for (module, version, name) in list {
        let start = file.len();
        file.extend_from_slice(&[0; 4]);
        file.extend_from_slice(&3u32.to_le_bytes());
        file.push(module.len() as u8);
        file.extend_from_slice(module.as_bytes());
        file.resize(file.len().next_multiple_of(4), 0);
        file.extend_from_slice(&version.to_le_bytes());
        file.push(name.len() as u8);
        file.extend_from_slice(name.as_bytes());
        file.resize(file.len().next_multiple_of(4), 0);
        let length = (file.len() - start - 4) as u32;
        file[start..start + 4].copy_from_slice(&length.to_le_bytes());
    }
    file
}
