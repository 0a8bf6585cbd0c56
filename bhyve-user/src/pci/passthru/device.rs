//! The function as the guest sees it.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU8, Ordering};

use vmmapi::host_pci::{BARS, HostBar};

use super::backend::Backend;
use super::msix::{Entry, Order, Table};
use super::request::{MsiCapability, MsixCapability, Rules};
use crate::bus::ones;
use crate::lock;
use crate::machine::Machine;
use crate::pci::PciDevice;
use crate::pci::bar::BarKind;
use crate::pci::catalog::Plan;
use crate::pci::config::{CMD_INTX_OFF, CMD_IO, CMD_MASTER, CMD_MEMORY, CMD_PARITY, CMD_SERR};
use crate::pci::config::{COMMAND, Config};
use crate::pci::function::{Blueprint, PciFunction};
use crate::pci::{ECAM_BASE, MEM64_LIMIT};

const PAGE: u64 = 4096;
/// Command bits that are the guest's to set in the device itself.
const COMMAND_THEIRS: u16 = CMD_MASTER | CMD_PARITY | CMD_SERR;

/// A piece of a memory BAR, whole pages, that the guest has before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Piece {
    offset: u64,
    len: u64,
}

/// What is in the guest's memory of a BAR.
#[derive(Clone, Debug, Default)]
struct Window {
    /// Where the BAR's start is, while any piece is there.
    gpa: Option<u64>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Msi {
    address: u64,
    data: u64,
    /// 0: off.
    count: u32,
}

struct State {
    table: Table,
    msi: Msi,
    windows: [Window; BARS],
    /// The command register that the device has.
    command: u16,
}

/// What the kernel may refuse; each is said once.
#[derive(Clone, Copy, Debug)]
enum Refused {
    Msi,
    MsixVector,
    MsixOff,
    Show,
    Hide,
    Move,
}

/// A function of the host's.
pub struct Passthrough {
    backend: Box<dyn Backend>,
    rules: Rules,
    bars: Vec<HostBar>,
    /// Of each BAR.
    pieces: [Vec<Piece>; BARS],
    state: Mutex<State>,
    /// Bits of [`Refused`].
    complained: AtomicU8,
}

impl Passthrough {
    /// The function for the guest's bus.
    ///
    /// # Errors
    /// It has no interrupts that can be passed, or its registers cannot be reached.
    pub fn plan(mut backend: Box<dyn Backend>, rom: Vec<u8>) -> Result<Plan, String> {
        let mut image = [0; 256];
        for (at, four) in (0..).step_by(4).zip(image.chunks_exact_mut(4)) {
            four.copy_from_slice(&backend.config_read(at, 4).to_le_bytes());
        }
        let name = backend.name();
        if image[..4] == [0xff; 4] {
            return Err(format!("{name} does not answer"));
        }
        let (rules, config) = Rules::new(&image);
        if rules.msi.is_none() && rules.msix.is_none() {
            return Err(format!("{name} {}", super::survey::NO_MESSAGES));
        }
        let bars = backend.bars();
        let mut plan = Blueprint::default();
        plan.config = config;
        let mut pieces: [Vec<Piece>; BARS] = Default::default();
        for bar in &bars {
            let kind = match (bar.io, bar.wide) {
                (true, _) => BarKind::Io,
                (_, true) => BarKind::Mem64,
                (_, false) => BarKind::Mem32,
            };
            plan.bar(bar.index, kind, bar.size);
            plan.prefetchable(bar.index, bar.prefetchable);
            if bar.io {
                continue;
            }
            let trapped = trapped(bar, rules.msix.as_ref());
            for t in &trapped {
                backend.open_registers(bar.index, t.offset, t.len)?;
            }
            if let Some(p) = pieces.get_mut(bar.index) {
                *p = passed(bar.size, &trapped);
            }
        }
        if !rom.is_empty() {
            plan.rom(rom);
        }
        let vectors = rules.msix.map_or(0, |m| m.vectors);
        let device = Passthrough {
            state: Mutex::new(State {
                table: Table::new(vectors),
                msi: Msi::default(),
                windows: Default::default(),
                command: CMD_IO | CMD_MEMORY | CMD_INTX_OFF,
            }),
            backend,
            rules,
            bars,
            pieces,
            complained: AtomicU8::new(0),
        };
        // As a reset leaves it, but for what the host needs.
        device.set_command(0);
        Ok((plan, Box::new(device)))
    }

    fn set_command(&self, guests: u16) {
        let mut state = lock(&self.state);
        state.command = CMD_IO | CMD_MEMORY | CMD_INTX_OFF | guests & COMMAND_THEIRS;
        self.backend.config_write(COMMAND, 2, state.command.into());
    }

    fn bar(&self, index: usize) -> Option<&HostBar> {
        self.bars.iter().find(|b| b.index == index)
    }

    /// The table's offset, if the access is to it.
    fn in_table(&self, bar: usize, offset: u64) -> Option<u64> {
        let m = self.rules.msix.as_ref()?;
        let at = offset.checked_sub(m.table.1)?;
        (m.table.0 == bar && at < u64::from(m.vectors) * super::msix::ENTRY).then_some(at)
    }

    /// Says what the kernel would not do, each kind once: the guest goes on without.
    fn say(&self, kind: Refused, text: std::fmt::Arguments) {
        let bit = 1 << kind as u8;
        if self.complained.fetch_or(bit, Ordering::Relaxed) & bit == 0 {
            eprintln!("passthru {}: {text}\r", self.backend.name());
        }
    }

    fn check(&self, kind: Refused, what: std::fmt::Arguments, result: vmmapi::Result<()>) {
        if let Err(e) = result {
            self.say(kind, format_args!("{what}: {e}"));
        }
    }

    fn set_vector(&self, index: u16, entry: Entry) {
        let what = format_args!("MSI-X vector {index} cannot be had");
        let set = self.backend.msix(index, entry);
        self.check(Refused::MsixVector, what, set);
    }

    fn obey(&self, orders: impl IntoIterator<Item = Order>) {
        for order in orders {
            match order {
                Order::Set(index, entry) => self.set_vector(index, entry),
                Order::Off(open) => match self.backend.msix_off() {
                    // FreeBSD 12 leaves it on until the VM is destroyed; what is masked is
                    // as quiet.
                    Err(e) if e.errno() == Some(nix::libc::ENOTTY) => {
                        for index in open {
                            self.set_vector(index, Entry::MASKED);
                        }
                    }
                    done => {
                        let what = format_args!("MSI-X cannot be switched off");
                        self.check(Refused::MsixOff, what, done);
                    }
                },
            }
        }
    }

    fn msi_changed(&self, config: &Config, cap: MsiCapability) {
        let control = config.get16(cap.at + 2);
        let high = if cap.wide {
            config.get(cap.at + 8, 4)
        } else {
            0
        };
        let data = config.get16(cap.at + if cap.wide { 12 } else { 8 });
        let on = control & 1 != 0;
        // The guest may ask for more than there is.
        let most = (control >> 1 & 7).min(5);
        let count = 1_u32 << (control >> 4 & 7).min(most);
        let wanted = if on {
            Msi {
                address: u64::from(high) << 32 | u64::from(config.get(cap.at + 4, 4)),
                data: data.into(),
                count,
            }
        } else {
            Msi::default()
        };
        let mut state = lock(&self.state);
        if state.msi != wanted {
            state.msi = wanted;
            let Msi {
                address,
                data,
                count,
            } = wanted;
            let set = self.backend.msi(address, data, count);
            let why = match count {
                0 | 1 => "",
                _ => "; more than one takes a host whose own IOMMU driver remaps interrupts",
            };
            let what = format_args!("MSI ({count} messages) cannot be set up{why}");
            self.check(Refused::Msi, what, set);
        }
    }

    /// Takes a BAR's pieces out of the guest's memory. False where they stay there:
    /// FreeBSD 12 cannot.
    fn hide(&self, state: &mut State, index: usize) -> bool {
        let (Some(bar), Some(window)) = (self.bar(index), state.windows.get_mut(index)) else {
            return true;
        };
        let Some(gpa) = window.gpa else {
            return true;
        };
        for p in self.pieces.get(index).into_iter().flatten() {
            let gone = self
                .backend
                .unmap(gpa + p.offset, bar.base + p.offset, p.len);
            match gone {
                Err(e) if e.errno() == Some(nix::libc::ENOTTY) => return false,
                // Those of a BAR of which not all could be shown.
                Err(e) if e.errno() == Some(nix::libc::ENOENT) => {}
                done => {
                    let what = format_args!("BAR {index} cannot be taken away");
                    self.check(Refused::Hide, what, done);
                }
            }
        }
        window.gpa = None;
        true
    }
}

/// The parts of a memory BAR that the guest reaches by exits: the pages of the MSI-X
/// table, and all of a BAR that does not have whole pages, for there others may
/// begin.
fn trapped(bar: &HostBar, msix: Option<&MsixCapability>) -> Vec<Piece> {
    if !bar.base.is_multiple_of(PAGE) || !bar.size.is_multiple_of(PAGE) {
        return vec![Piece {
            offset: 0,
            len: bar.size,
        }];
    }
    let table = msix.filter(|m| m.table.0 == bar.index);
    let table = table.and_then(|m| {
        let offset = m.table.1 / PAGE * PAGE;
        let end = m.table.1 + u64::from(m.vectors) * super::msix::ENTRY;
        let end = end.next_multiple_of(PAGE).min(bar.size);
        (offset < end).then(|| Piece {
            offset,
            len: end - offset,
        })
    });
    table.into_iter().collect()
}

/// The rest of it.
fn passed(size: u64, trapped: &[Piece]) -> Vec<Piece> {
    let mut pieces = Vec::new();
    let mut at = 0;
    for t in trapped {
        if t.offset > at {
            pieces.push(Piece {
                offset: at,
                len: t.offset - at,
            });
        }
        at = t.offset + t.len;
    }
    if size > at {
        pieces.push(Piece {
            offset: at,
            len: size - at,
        });
    }
    pieces
}

/// Where a BAR may be shown: above guest memory, and not over what the processor
/// or the chipset has below 4 GiB. A guest that sizes a BAR passes through there.
fn showable(gpa: u64, size: u64) -> bool {
    let end = gpa.saturating_add(size);
    end <= ECAM_BASE || gpa >= 1 << 32 && end <= MEM64_LIMIT
}

impl PciDevice for Passthrough {
    fn bar_read(&self, _: &PciFunction, bar: usize, offset: u64, size: u8) -> u64 {
        if self.bar(bar).is_some_and(|b| b.io) {
            return self.backend.port_read(bar, offset, size).into();
        }
        match self.in_table(bar, offset) {
            Some(at) => lock(&self.state).table.read(at, size).into(),
            None => self.backend.register_read(bar, offset, size).into(),
        }
    }

    fn bar_write(&self, _: &PciFunction, bar: usize, offset: u64, size: u8, value: u64) {
        let value = (value & ones(size)) as u32;
        if self.bar(bar).is_some_and(|b| b.io) {
            self.backend.port_write(bar, offset, size, value);
            return;
        }
        match self.in_table(bar, offset) {
            Some(at) => {
                // With the lock: vCPUs' orders reach the kernel in their order.
                let mut state = lock(&self.state);
                let order = state.table.write(at, size, value);
                self.obey(order);
            }
            None => self.backend.register_write(bar, offset, size, value),
        }
    }

    fn config_read(&self, config: &Config, offset: u16, size: u8) -> Option<u32> {
        self.rules.reads_device(offset, size).then(|| {
            let theirs = self.backend.config_read(offset, size);
            let ours = config.get(offset, size);
            self.rules.merge(offset, size, ours, theirs)
        })
    }

    fn config_write(&self, config: &mut Config, offset: u16, size: u8, value: u32) -> bool {
        let touches = |at: u16, len: u16| offset < at + len && at < offset + u16::from(size);
        for (offset, size, value) in self.rules.write(config, offset, size, value) {
            self.backend.config_write(offset, size, value);
        }
        if touches(COMMAND, 2) {
            let mut bytes = config.get16(COMMAND).to_le_bytes();
            for (at, v) in (offset..).zip(value.to_le_bytes()).take(size.into()) {
                if let Some(b) = at
                    .checked_sub(COMMAND)
                    .and_then(|i| bytes.get_mut(usize::from(i)))
                {
                    *b = v;
                }
            }
            self.set_command(u16::from_le_bytes(bytes));
        }
        if let Some(cap) = self.rules.msi
            && touches(cap.at, if cap.wide { 14 } else { 10 })
        {
            self.msi_changed(config, cap);
        }
        if let Some(cap) = self.rules.msix
            && touches(cap.at + 2, 2)
        {
            let control = config.get16(cap.at + 2);
            let mut state = lock(&self.state);
            let orders = state.table.control(control);
            self.obey(orders);
        }
        // The rest of the command register, BARs and ROM are every function's.
        let common = touches(COMMAND, 4) || touches(0x0c, 2) || (0x10..0x34).contains(&offset);
        !common
    }

    fn bar_moved(&self, index: usize, addr: Option<u64>, _: &dyn Machine) {
        let mut state = lock(&self.state);
        let state = &mut *state;
        let Some(bar) = self.bar(index).filter(|b| !b.io) else {
            return;
        };
        let Some(gpa) = addr else {
            self.hide(state, index);
            return;
        };
        let shown = state.windows.get(index).and_then(|w| w.gpa);
        if shown == Some(gpa) || !showable(gpa, bar.size) {
            return;
        }
        if !self.hide(state, index) {
            let what = format_args!(
                "this kernel's vmm.ko cannot move BARs; BAR {index} stays where it was"
            );
            self.say(Refused::Move, what);
            return;
        }
        for p in self.pieces.get(index).into_iter().flatten() {
            let shown = self.backend.map(gpa + p.offset, bar.base + p.offset, p.len);
            let what = format_args!("BAR {index} cannot be shown at {gpa:#x}");
            self.check(Refused::Show, what, shown);
        }
        if let Some(window) = state.windows.get_mut(index) {
            window.gpa = Some(gpa);
        }
    }
}

#[cfg(test)]
#[path = "device_tests.rs"]
mod tests;
