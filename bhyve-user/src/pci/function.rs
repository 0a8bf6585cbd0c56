//! One PCI function: configuration space with its rules, BARs on the buses,
//! and its interrupts by whichever way the guest chose.

use std::sync::{Arc, Mutex, Weak};

use super::bar::{Bar, BarKind, Windows};
use super::config::{self, BAR0, BARS, COMMAND, Config};
use super::intx::{Route, Router};
use super::msi::{self, MsixTable};
use super::rom::Rom;
use super::{Bdf, PciDevice};
use crate::bus::{BusError, Buses, MmioDevice, PortDevice, PortSlot, ones};
use crate::lock;
use crate::machine::Machine;

/// What a device asks for before it has addresses.
#[derive(Default)]
pub struct Blueprint {
    /// Configuration space: identity and capabilities.
    pub config: Config,
    bars: Vec<(usize, BarKind, u64)>,
    /// Whether memory BARs say that they are prefetchable, where that is known.
    prefetchable: [Option<bool>; BARS],
    rom: Vec<u8>,
    msi: Option<u16>,
    msix: Option<(u16, usize, MsixTable)>,
    window: Option<u16>,
    /// Whether it has an INTx pin.
    pub intx: bool,
}

impl Blueprint {
    /// Asks for a BAR.
    pub fn bar(&mut self, index: usize, kind: BarKind, size: u64) {
        self.bars.push((index, kind, size));
    }
    /// Has a memory BAR say whether it is prefetchable; otherwise its size decides.
    pub fn prefetchable(&mut self, index: usize, is: bool) {
        if let Some(known) = self.prefetchable.get_mut(index) {
            *known = Some(is);
        }
    }
    /// Gives it an expansion ROM.
    pub fn rom(&mut self, image: Vec<u8>) {
        self.rom = image;
    }
    /// Adds a way to the BARs through configuration space, as virtio has it
    /// (virtio 1.2 §4.1.4.9): BAR, offset and length are written, then data is
    /// read or written.
    pub fn window(&mut self) {
        let mut body = [0; 18];
        body[0] = 20;
        body[1] = WINDOW_KIND;
        self.window = self.config.add_capability(config::CAP_VENDOR, &body);
    }
    /// Adds MSI with `1 << log2` messages.
    pub fn msi(&mut self, log2: u8) {
        self.msi = msi::add_msi(&mut self.config, log2);
    }
    /// Adds MSI-X with its table alone in BAR `bar`.
    pub fn msix(&mut self, vectors: u16, bar: usize) {
        if let Some(cap) = msi::add_msix(&mut self.config, vectors, bar as u8) {
            self.msix = Some((cap, bar, MsixTable::new(vectors)));
            self.bar(bar, BarKind::Mem32, msi::msix_bar_size(vectors));
        }
    }
}

/// VIRTIO_PCI_CAP_PCI_CFG, and its registers behind the capability's start.
const WINDOW_KIND: u8 = 5;
const WINDOW_BAR: u16 = 4;
const WINDOW_OFFSET: u16 = 8;
const WINDOW_LENGTH: u16 = 12;
const WINDOW_DATA: u16 = 16;
const WINDOW_END: u16 = 20;

/// In a memory BAR.
const PREFETCHABLE: u32 = 8;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Line {
    Idle,
    Asserted,
    /// Up, but the guest masked INTx or chose MSI.
    Pending,
}

#[derive(Clone, Copy, Debug)]
enum Slot {
    Empty,
    Bar {
        bar: Bar,
        mapped: bool,
    },
    /// The upper half of the BAR before.
    High,
}

struct State {
    config: Config,
    bars: [Slot; BARS],
    msi: Option<u16>,
    msix: Option<(u16, usize, MsixTable)>,
    line: Line,
}

impl State {
    fn intx_permitted(&self) -> bool {
        let masked = self.config.get16(COMMAND) & config::CMD_INTX_OFF != 0;
        let msi = self
            .msi
            .is_some_and(|cap| msi::msi_enabled(&self.config, cap));
        let msix = self
            .msix
            .as_ref()
            .is_some_and(|(cap, ..)| msi::msix_state(&self.config, *cap).0);
        !(masked || msi || msix)
    }
    fn decodes(&self, kind: BarKind) -> bool {
        let bit = if kind == BarKind::Io {
            config::CMD_IO
        } else {
            config::CMD_MEMORY
        };
        self.config.get16(COMMAND) & bit != 0
    }
}

/// A function in its slot.
pub struct PciFunction {
    /// Where it is.
    pub at: Bdf,
    /// What it is.
    pub device: Box<dyn PciDevice>,
    state: Mutex<State>,
    /// Empty once the function is off its buses.
    handlers: Mutex<Vec<Handler>>,
    /// The capability that [`Blueprint::window`] made.
    window: Option<u16>,
    rom: Option<Rom>,
    route: Option<Route>,
    router: Arc<Router>,
    /// The buses own the function, not the other way round.
    buses: Weak<Buses>,
    machine: Arc<dyn Machine>,
}

#[derive(Clone)]
struct Handler {
    bar: usize,
    mmio: Arc<dyn MmioDevice>,
    ports: Option<PortSlot>,
}

/// A BAR on a bus.
struct BarRange {
    function: Arc<PciFunction>,
    bar: usize,
}

/// Why a function could not be made.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FunctionError {
    /// The address window for BARs is used up.
    #[error("no room left for BAR {0} of {1:#x} bytes")]
    NoRoom(usize, u64),
    /// The bus refused it.
    #[error(transparent)]
    Bus(#[from] BusError),
}

/// What a function is connected to.
pub struct Wiring<'a> {
    /// The buses its BARs go on.
    pub buses: &'a Arc<Buses>,
    /// The VM.
    pub machine: &'a Arc<dyn Machine>,
    /// The INTx router.
    pub router: &'a Arc<Router>,
    /// Address windows.
    pub windows: &'a mut Windows,
    /// Route and pin (0 for INTA) of its INTx, if it has one.
    pub intx: Option<(u8, Route)>,
}

impl PciFunction {
    /// Gives a device addresses and puts it on the buses.
    pub fn new(
        at: Bdf,
        plan: Blueprint,
        device: Box<dyn PciDevice>,
        wiring: Wiring<'_>,
    ) -> Result<Arc<PciFunction>, FunctionError> {
        let mut config = plan.config;
        let mut bars = [Slot::Empty; BARS];
        for &(index, kind, size) in &plan.bars {
            let full = FunctionError::NoRoom(index, size);
            let mut bar = wiring.windows.allocate(kind, size).ok_or(full.clone())?;
            if let Some(Some(is)) = plan.prefetchable.get(index)
                && kind != BarKind::Io
            {
                bar.flags = bar.flags & !PREFETCHABLE | if *is { PREFETCHABLE } else { 0 };
            }
            let register = BAR0 + 4 * index as u16;
            config.set32(register, bar.low());
            if kind == BarKind::Mem64 {
                config.set32(register + 4, (bar.addr >> 32) as u32);
                *bars.get_mut(index + 1).ok_or(full.clone())? = Slot::High;
            }
            *bars.get_mut(index).ok_or(full)? = Slot::Bar { bar, mapped: false };
        }
        let rom = match plan.rom.as_slice() {
            [] => None,
            image => Some(Rom::new(image, &mut config, wiring.windows)?),
        };
        if let Some((pin, route)) = wiring.intx {
            config.set8(config::INT_PIN, pin + 1);
            config.set8(config::INT_LINE, wiring.router.isa(route));
        }
        let state = State {
            config,
            bars,
            msi: plan.msi,
            msix: plan.msix,
            line: Line::Idle,
        };
        let function = Arc::new(PciFunction {
            at,
            device,
            state: Mutex::new(state),
            handlers: Mutex::default(),
            window: plan.window,
            rom,
            route: wiring.intx.map(|(_, r)| r),
            router: Arc::clone(wiring.router),
            buses: Arc::downgrade(wiring.buses),
            machine: Arc::clone(wiring.machine),
        });
        let mut handlers = Vec::new();
        for &(bar, kind, _) in &plan.bars {
            let range = Arc::new(BarRange {
                function: Arc::clone(&function),
                bar,
            });
            let ports = match kind {
                BarKind::Io => Some(wiring.buses.ports.add(range.clone())?),
                _ => None,
            };
            handlers.push(Handler {
                bar,
                mmio: range,
                ports,
            });
        }
        *lock(&function.handlers) = handlers;
        function.update_mappings(&mut lock(&function.state));
        function.device.attached(&function);
        Ok(function)
    }

    /// Marks the function as one of several in its slot.
    pub fn set_multi_function(&self) {
        lock(&self.state).config.set8(config::HEADER_TYPE, 0x80);
    }

    /// The INTx pin (0 for INTA) and where it goes.
    pub fn intx(&self) -> Option<(u8, Route)> {
        let pin = lock(&self.state).config.get8(config::INT_PIN);
        Some((pin.checked_sub(1)?, self.route?))
    }

    /// A configuration read of 1, 2 or 4 aligned bytes.
    pub fn config_read(&self, offset: u16, size: u8) -> u32 {
        if self.window.is_some_and(|cap| offset == cap + WINDOW_DATA)
            && let Some((bar, at, length)) = self.behind_window()
        {
            let value = self.device.bar_read(self, bar, at, length);
            return (value & ones(size.min(length))) as u32;
        }
        match offset {
            0..=0xff => {
                let state = lock(&self.state);
                let device = self.device.config_read(&state.config, offset, size);
                device.unwrap_or_else(|| state.config.get(offset, size))
            }
            // No extended capabilities: a header of zeroes.
            0x100..=0x103 => 0,
            _ => ones(size) as u32,
        }
    }

    /// A configuration write of 1, 2 or 4 aligned bytes.
    pub fn config_write(&self, offset: u16, size: u8, value: u32) {
        if let Some(cap) = self.window
            && (cap + WINDOW_BAR..cap + WINDOW_END).contains(&offset)
        {
            self.window_write(offset, offset - cap, size, value);
            return;
        }
        let mut state = lock(&self.state);
        let state = &mut *state;
        if offset > 0xff
            || self
                .device
                .config_write(&mut state.config, offset, size, value)
        {
            return;
        }
        let bars = BAR0..BAR0 + 4 * BARS as u16;
        if bars.contains(&offset) {
            if size == 4 {
                self.write_bar(state, usize::from((offset - BAR0) / 4), value);
            }
            return;
        }
        if (config::ROM..config::ROM + 4).contains(&offset) {
            if size == 4
                && let Some(rom) = &self.rom
                && let Some(buses) = self.buses.upgrade()
            {
                let decodes = state.decodes(BarKind::Mem32);
                rom.write(&mut state.config, value, decodes, &buses);
            }
            return;
        }
        if let Some((id, cap)) = state.config.capability_at(offset) {
            if msi::config_write(&mut state.config, id, cap, offset, size, value) {
                self.interrupts_changed(state);
            }
            return;
        }
        for (at, byte) in (offset..).zip(value.to_le_bytes()).take(usize::from(size)) {
            let writable = match at {
                0x04 => 0x47,
                0x05 => 0x05,
                0x0c | 0x0d | config::INT_LINE => 0xff,
                _ => 0,
            };
            let old = state.config.get8(at);
            state.config.set8(at, (old & !writable) | (byte & writable));
        }
        if offset < COMMAND + 2 && offset + u16::from(size) > COMMAND {
            self.update_mappings(state);
            if let (Some(rom), Some(buses)) = (&self.rom, self.buses.upgrade()) {
                rom.update(&state.config, state.decodes(BarKind::Mem32), &buses);
            }
            self.update_line(state);
        }
    }

    /// Where the window leads now: BAR, offset in it, bytes.
    fn behind_window(&self) -> Option<(usize, u64, u8)> {
        let state = lock(&self.state);
        let cap = self.window?;
        let bar = usize::from(state.config.get8(cap + WINDOW_BAR));
        let at = u64::from(state.config.get(cap + WINDOW_OFFSET, 4));
        let length = state.config.get(cap + WINDOW_LENGTH, 4);
        let size = match state.bars.get(bar) {
            // The MSI-X table is no business of the device's.
            Some(Slot::Bar { bar: b, .. })
                if state.msix.as_ref().is_none_or(|(_, m, _)| *m != bar) =>
            {
                b.size
            }
            _ => return None,
        };
        let fits = matches!(length, 1 | 2 | 4)
            && at.is_multiple_of(length.into())
            && at + u64::from(length) <= size;
        fits.then_some((bar, at, length as u8))
    }

    fn window_write(&self, offset: u16, register: u16, size: u8, value: u32) {
        if register == WINDOW_DATA {
            if let Some((bar, at, length)) = self.behind_window() {
                let value = u64::from(value) & ones(size.min(length));
                self.device.bar_write(self, bar, at, length, value);
            }
            return;
        }
        // Behind the BAR's number there are three bytes of nothing.
        if register == WINDOW_BAR || (WINDOW_OFFSET..WINDOW_DATA).contains(&register) {
            let size = if register == WINDOW_BAR { 1 } else { size };
            lock(&self.state).config.set(offset, size, value);
        }
    }

    /// Whether the guest has MSI-X enabled.
    pub fn msix_enabled(&self) -> bool {
        let state = lock(&self.state);
        let cap = state.msix.as_ref().map(|(cap, ..)| *cap);
        cap.is_some_and(|cap| msi::msix_state(&state.config, cap).0)
    }

    /// Sends an interrupt: MSI-X vector `vector`, or that MSI message; false
    /// if the guest uses neither, so that INTx is due.
    pub fn message(&self, vector: u16) -> bool {
        let mut state = lock(&self.state);
        let state = &mut *state;
        if let Some((cap, _, table)) = &mut state.msix {
            let (enabled, masked) = msi::msix_state(&state.config, *cap);
            if enabled {
                if let Some(m) = table.trigger(vector, masked) {
                    self.machine.msi(m.address, m.data);
                }
                return true;
            }
        }
        let Some(cap) = state
            .msi
            .filter(|&cap| msi::msi_enabled(&state.config, cap))
        else {
            return false;
        };
        // Vectors beyond what the guest granted share the first.
        let message = msi::msi_message(&state.config, cap, vector)
            .or_else(|| msi::msi_message(&state.config, cap, 0));
        if let Some(m) = message {
            self.machine.msi(m.address, m.data);
        }
        true
    }

    /// Raises or lowers the function's INTx line.
    pub fn set_intx(&self, level: bool) {
        let mut state = lock(&self.state);
        match (level, state.line) {
            (true, Line::Idle) => {
                state.line = Line::Pending;
                self.update_line(&mut state);
            }
            (false, Line::Asserted) => {
                state.line = Line::Idle;
                if let Some(route) = self.route {
                    self.router.deassert(route);
                }
            }
            (false, Line::Pending) => state.line = Line::Idle,
            _ => {}
        }
    }

    fn update_line(&self, state: &mut State) {
        let Some(route) = self.route else { return };
        match (state.line, state.intx_permitted()) {
            (Line::Pending, true) => {
                state.line = Line::Asserted;
                self.router.assert(route);
            }
            (Line::Asserted, false) => {
                state.line = Line::Pending;
                self.router.deassert(route);
            }
            _ => {}
        }
    }

    fn interrupts_changed(&self, state: &mut State) {
        if let Some((cap, _, table)) = &mut state.msix
            && msi::msix_state(&state.config, *cap) == (true, false)
        {
            for m in table.unmask_all() {
                self.machine.msi(m.address, m.data);
            }
        }
        self.update_line(state);
    }

    fn write_bar(&self, state: &mut State, index: usize, value: u32) {
        let low = match state.bars.get(index) {
            Some(Slot::Bar { .. }) => index,
            Some(Slot::High) => index - 1,
            _ => return,
        };
        let Some(Slot::Bar { bar, .. }) = state.bars.get(low) else {
            return;
        };
        let addr = if low == index {
            bar.with_low(value)
        } else {
            bar.with_high(value)
        };
        self.unmap(state, low);
        let register = BAR0 + 4 * low as u16;
        if let Some(Slot::Bar { bar, .. }) = state.bars.get_mut(low) {
            bar.addr = addr;
            state.config.set32(register, bar.low());
            if bar.kind == BarKind::Mem64 {
                state.config.set32(register + 4, (addr >> 32) as u32);
            }
        }
        self.update_mappings(state);
    }

    /// Takes the function off its buses for good. They own each other until
    /// then: a process that makes VM after VM would keep them all.
    pub fn detach(&self) {
        let mut state = lock(&self.state);
        for index in 0..BARS {
            self.unmap(&mut state, index);
        }
        if let (Some(rom), Some(buses)) = (&self.rom, self.buses.upgrade()) {
            rom.update(&state.config, false, &buses);
        }
        lock(&self.handlers).clear();
    }

    fn handler(&self, bar: usize) -> Option<(Handler, Arc<Buses>)> {
        let handler = lock(&self.handlers)
            .iter()
            .find(|h| h.bar == bar)
            .cloned()?;
        Some((handler, self.buses.upgrade()?))
    }

    /// Makes the buses agree with the command register.
    fn update_mappings(&self, state: &mut State) {
        for index in 0..BARS {
            let Some(&Slot::Bar { bar, mapped }) = state.bars.get(index) else {
                continue;
            };
            let wanted = state.decodes(bar.kind);
            if wanted && !mapped {
                self.map(state, index);
            } else if !wanted && mapped {
                self.unmap(state, index);
            }
        }
    }

    fn map(&self, state: &mut State, index: usize) {
        let Some((handler, buses)) = self.handler(index) else {
            return;
        };
        let Some(Slot::Bar { bar, mapped }) = state.bars.get_mut(index) else {
            return;
        };
        let done = match handler.ports {
            Some(slot) => buses.ports.map(slot, bar.addr as u16, bar.size as u16),
            None => buses
                .mmio
                .map(bar.addr, bar.size, Arc::clone(&handler.mmio)),
        };
        // A guest that puts a BAR over another device's range gets no answer
        // there; sizing does so in passing.
        *mapped = done.is_ok();
        if *mapped {
            let addr = Some(bar.addr);
            self.device.bar_moved(index, addr, &*self.machine);
        }
    }

    fn unmap(&self, state: &mut State, index: usize) {
        let Some((handler, buses)) = self.handler(index) else {
            return;
        };
        let Some(Slot::Bar { bar, mapped }) = state.bars.get_mut(index) else {
            return;
        };
        if std::mem::take(mapped) {
            self.device.bar_moved(index, None, &*self.machine);
            match handler.ports {
                Some(slot) => buses.ports.unmap(slot, bar.addr as u16, bar.size as u16),
                None => buses.mmio.unmap(bar.addr, &handler.mmio),
            }
        }
    }
}

impl BarRange {
    fn offset(&self, addr: u64) -> u64 {
        match lock(&self.function.state).bars.get(self.bar) {
            Some(Slot::Bar { bar, .. }) => addr & (bar.size - 1),
            _ => 0,
        }
    }

    fn read(&self, offset: u64, size: u8) -> u64 {
        let f = &*self.function;
        if let Some((_, bar, table)) = &lock(&f.state).msix
            && *bar == self.bar
        {
            return table.read(offset, size);
        }
        if size == 8 {
            f.device.bar_read(f, self.bar, offset, 4) & 0xffff_ffff
                | f.device.bar_read(f, self.bar, offset + 4, 4) << 32
        } else {
            f.device.bar_read(f, self.bar, offset, size)
        }
    }

    fn write(&self, offset: u64, size: u8, value: u64) {
        let f = &*self.function;
        let mut state = lock(&f.state);
        if let Some((_, bar, table)) = &mut state.msix
            && *bar == self.bar
        {
            if let Some(m) = table.write(offset, size, value) {
                f.machine.msi(m.address, m.data);
            }
            return;
        }
        drop(state);
        if size == 8 {
            f.device
                .bar_write(f, self.bar, offset, 4, value & 0xffff_ffff);
            f.device.bar_write(f, self.bar, offset + 4, 4, value >> 32);
        } else {
            f.device.bar_write(f, self.bar, offset, size, value);
        }
    }
}

impl PortDevice for BarRange {
    fn port_read(&self, port: u16, size: u8) -> Option<u32> {
        Some(self.read(self.offset(port.into()), size) as u32)
    }
    fn port_write(&self, port: u16, size: u8, value: u32) -> bool {
        self.write(self.offset(port.into()), size, value.into());
        true
    }
}

impl MmioDevice for BarRange {
    fn mmio_read(&self, gpa: u64, size: u8) -> u64 {
        self.read(self.offset(gpa), size)
    }
    fn mmio_write(&self, gpa: u64, size: u8, value: u64) {
        self.write(self.offset(gpa), size, value);
    }
}

#[cfg(test)]
#[path = "function_tests.rs"]
mod tests;
