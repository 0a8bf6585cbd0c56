//! sysfs: `/sys/bus/pci/devices/SEGMENT:BUS:SLOT.FUNCTION/`.

use super::{BARS, HostBar, PciAddress};
use std::fs::{self, File};
use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// IORESOURCE_* of Linux's ioport.h, as the file `resource` shows them.
const IO: u64 = 0x100;
const MEMORY: u64 = 0x200;
const PREFETCH: u64 = 0x2000;
const WIDE: u64 = 0x10_0000;

#[derive(Debug)]
pub(super) struct Function {
    folder: PathBuf,
    config: File,
    /// Of BARs of ports.
    ports: [Option<File>; BARS],
}

fn named(path: &Path, e: io::Error) -> io::Error {
    io::Error::new(e.kind(), format!("{}: {e}", path.display()))
}

fn open(path: &Path) -> io::Result<File> {
    let file = File::options().read(true).write(true).open(path);
    file.map_err(|e| named(path, e))
}

impl Function {
    /// None: these are files of one function, and no requests are made of them.
    pub(super) fn descriptors(&self) -> Vec<(BorrowedFd<'_>, &'static [u32])> {
        Vec::new()
    }

    pub(super) fn open(at: PciAddress) -> io::Result<Function> {
        let PciAddress { bus, slot, func } = at;
        let name = format!("0000:{bus:02x}:{slot:02x}.{func:x}");
        let folder = Path::new("/sys/bus/pci/devices").join(name);
        let mut function = Function {
            config: open(&folder.join("config"))?,
            folder,
            ports: Default::default(),
        };
        for bar in function.bars()?.iter().filter(|b| b.io) {
            let path = function.resource(bar.index);
            if let Some(file) = function.ports.get_mut(bar.index) {
                *file = Some(open(&path)?);
            }
        }
        Ok(function)
    }

    fn resource(&self, bar: usize) -> PathBuf {
        self.folder.join(format!("resource{bar}"))
    }

    pub(super) fn bars(&self) -> io::Result<Vec<HostBar>> {
        let path = self.folder.join("resource");
        let text = fs::read_to_string(&path).map_err(|e| named(&path, e))?;
        Ok(parse(&text))
    }

    pub(super) fn config_read(&self, offset: u16, size: u8) -> io::Result<u32> {
        read(&self.config, offset.into(), size)
    }

    pub(super) fn config_write(&self, offset: u16, size: u8, value: u32) -> io::Result<()> {
        write(&self.config, offset.into(), size, value)
    }

    fn ports(&self, bar: &HostBar) -> io::Result<&File> {
        let file = self.ports.get(bar.index).and_then(Option::as_ref);
        file.ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    pub(super) fn port_read(&self, bar: &HostBar, offset: u64, size: u8) -> io::Result<u32> {
        read(self.ports(bar)?, offset, size)
    }

    pub(super) fn port_write(
        &self,
        bar: &HostBar,
        offset: u64,
        size: u8,
        value: u32,
    ) -> io::Result<()> {
        write(self.ports(bar)?, offset, size, value)
    }

    /// The file that a memory BAR is mapped from, and where in it the page of the
    /// BAR's start is.
    pub(super) fn memory(&self, bar: &HostBar) -> io::Result<(File, u64)> {
        Ok((open(&self.resource(bar.index))?, 0))
    }
}

/// The kernel makes one access of the bus of it.
fn read(file: &File, offset: u64, size: u8) -> io::Result<u32> {
    let mut bytes = [0; 4];
    let wanted = bytes.get_mut(..usize::from(size));
    let wanted = wanted.ok_or(io::ErrorKind::InvalidInput)?;
    file.read_exact_at(wanted, offset)?;
    Ok(u32::from_le_bytes(bytes))
}

fn write(file: &File, offset: u64, size: u8, value: u32) -> io::Result<()> {
    let bytes = value.to_le_bytes();
    let wanted = bytes.get(..usize::from(size));
    file.write_all_at(wanted.ok_or(io::ErrorKind::InvalidInput)?, offset)
}

/// `FIRST LAST FLAGS`, a line a BAR, hexadecimal; zeroes where there is none.
fn parse(text: &str) -> Vec<HostBar> {
    let number = |word: &str| u64::from_str_radix(word.trim_start_matches("0x"), 16).ok();
    let bar = |(index, line): (usize, &str)| {
        let mut words = line.split_whitespace().map(number);
        let (first, last, flags) = (words.next()??, words.next()??, words.next()??);
        (flags & (IO | MEMORY) != 0 && last > first).then_some(HostBar {
            index,
            io: flags & IO != 0,
            wide: flags & WIDE != 0,
            prefetchable: flags & PREFETCH != 0,
            base: first,
            size: (last - first).checked_add(1)?,
        })
    };
    text.lines()
        .take(BARS)
        .enumerate()
        .filter_map(bar)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_resource_file_tells_the_bars() {
        let text = "\
0x00000000febc0000 0x00000000febdffff 0x0000000000040200
0x0000000000000000 0x0000000000000000 0x0000000000000000
0x000000000000c080 0x000000000000c09f 0x0000000000040101
0x00000000fe000000 0x00000000fe003fff 0x000000000014220c
0x0000000000000000 0x0000000000000000 0x0000000000000000
0x0000000000000000 0x0000000000000000 0x0000000000000000
0x00000000feb80000 0x00000000febbffff 0x0000000000046200
";
        let bars = parse(text);
        let memory = HostBar {
            index: 0,
            io: false,
            wide: false,
            prefetchable: false,
            base: 0xfebc_0000,
            size: 0x2_0000,
        };
        let ports = HostBar {
            index: 2,
            io: true,
            base: 0xc080,
            size: 0x20,
            ..memory
        };
        let wide = HostBar {
            index: 3,
            wide: true,
            prefetchable: true,
            base: 0xfe00_0000,
            size: 0x4000,
            ..memory
        };
        assert_eq!(bars, [memory, ports, wide], "the ROM is none of them");
        assert_eq!(parse("rubbish\n0x1 0x2\n"), []);
    }
}
