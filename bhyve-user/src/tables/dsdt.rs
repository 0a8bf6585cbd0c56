//! The DSDT: root bridges with their windows and `_PRT`, the LPC bridge with
//! its interrupt links and legacy devices, `_S5`.

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, And, Arg, Device, EISAName, Else, Equal, Field,
    FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule, IO, If, LessThan, Local,
    Memory32Fixed, Method, MethodCall, Name, ONE, OpRegion, OpRegionSpace, Package, PackageBuilder,
    Path, ResourceTemplate, Return, Scope, ShiftLeft, Store, ZERO,
};
use acpi_tables::sdt::Sdt;
use acpi_tables::{Aml, AmlSink};

use super::HPET;
use super::acpi::{Facts, intx_of};
use crate::pci::intx::PERMITTED;
use crate::pci::root::BusWindows;
use crate::pci::{Bdf, ECAM_BASE, ECAM_SIZE, IO_BASE};
use crate::pm::{self, SLP_TYP_S5};
use crate::serial::LEGACY;

/// AML bytes made elsewhere.
struct Raw(Vec<u8>);
impl Aml for Raw {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}

fn raw(parts: &[&dyn Aml]) -> Raw {
    let mut bytes = Vec::new();
    parts.iter().for_each(|p| p.to_aml_bytes(&mut bytes));
    Raw(bytes)
}

/// `IRQNoFlags` (ACPI 6.5 §6.4.2.1).
struct Irq(u8);
impl Aml for Irq {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.byte(0x22);
        sink.word(1 << (self.0 & 0xf));
    }
}

/// `IRQ (Level, ActiveLow, Shared)` of a mask.
struct LevelIrqs(u16);
impl Aml for LevelIrqs {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.byte(0x23);
        sink.word(self.0);
        sink.byte(0x18);
    }
}

/// `CreateWordField (source, index, name)`.
fn create_word_field(source: &dyn Aml, index: u8, name: Path) -> Raw {
    raw(&[&Raw(vec![0x8b]), source, &index, &name])
}

/// `FindSetRightBit (source, target)`.
fn find_set_right_bit(source: &dyn Aml, target: &dyn Aml) -> Raw {
    raw(&[&Raw(vec![0x82]), source, target])
}

fn hid(name: &str) -> Name {
    Name::new(Path::new("_HID"), &EISAName::new(name))
}

fn crs(children: Vec<&dyn Aml>) -> Name {
    Name::new(Path::new("_CRS"), &ResourceTemplate::new(children))
}

fn ports(first: u16, count: u8) -> IO {
    IO::new(first, first, 1, count)
}

/// The DSDT with its header.
pub fn build(facts: &Facts<'_>) -> Sdt {
    let mut t = Sdt::new(*b"DSDT", 36, 2, *b"BHYVE ", *b"BVDSDT  ", 1);
    let mut body = Vec::new();
    Name::new(
        Path::new("_S5_"),
        &Package::new(vec![&SLP_TYP_S5, &ZERO, &ZERO, &ZERO]),
    )
    .to_aml_bytes(&mut body);
    // The guest says by _PIC whether it uses the I/O APIC.
    Name::new(Path::new("PICM"), &ZERO).to_aml_bytes(&mut body);
    Method::new(
        Path::new("_PIC"),
        1,
        false,
        vec![&Store::new(&Path::new("PICM"), &Arg(0))],
    )
    .to_aml_bytes(&mut body);
    let buses: Vec<Raw> = facts
        .pci
        .buses()
        .iter()
        .map(|(&bus, windows)| root_bridge(facts, bus, windows))
        .collect();
    let hpet = hpet(facts);
    let mut children: Vec<&dyn Aml> = buses.iter().map(|b| b as &dyn Aml).collect();
    children.extend(hpet.iter().map(|h| h as &dyn Aml));
    Scope::new(Path::new("\\_SB_"), children).to_aml_bytes(&mut body);
    if facts.pci.has_lpc() {
        let serial = serial_ports(facts.serial);
        let lpc = facts
            .pci
            .functions()
            .find(|f| f.config_read(0x0a, 2) == 0x0601);
        if let Some(lpc) = lpc {
            let path = Path::new(&format!("\\_SB_.PC{:02X}.ISA_", lpc.at.bus));
            Scope::new(path, serial.iter().map(|s| s as &dyn Aml).collect())
                .to_aml_bytes(&mut body);
        }
    }
    t.append_slice(&body);
    t
}

fn hpet(facts: &Facts<'_>) -> Option<Raw> {
    facts.hpet?;
    let memory = Memory32Fixed::new(true, HPET, 0x400);
    Some(raw(&[&Device::new(
        Path::new("HPET"),
        vec![
            &hid("PNP0103"),
            &Name::new(Path::new("_UID"), &ZERO),
            &crs(vec![&memory]),
        ],
    )]))
}

fn root_bridge(facts: &Facts<'_>, bus: u8, w: &BusWindows) -> Raw {
    let word = |at: u64| at.min(0xffff) as u16;
    let bus_number = AddressSpace::<u16>::new_bus_number(bus.into(), bus.into());
    let config = ports(0xcf8, 8);
    let below = AddressSpace::<u16>::new_io(0, 0xcf7, None);
    let above = AddressSpace::<u16>::new_io(0xd00, word(u64::from(IO_BASE) - 1), None);
    let io = AddressSpace::<u16>::new_io(word(w.io.0), word(w.io.1 - 1), None);
    let uncached = AddressSpaceCacheable::NotCacheable;
    let mem32 = AddressSpace::<u32>::new_memory(
        uncached,
        true,
        w.mem32.0 as u32,
        (w.mem32.1 - 1) as u32,
        None,
    );
    let mem64 = AddressSpace::<u64>::new_memory(uncached, true, w.mem64.0, w.mem64.1 - 1, None);
    let mut resources: Vec<&dyn Aml> = vec![&bus_number];
    if bus == 0 {
        resources.extend([&config as &dyn Aml, &below, &above]);
    }
    if w.io.1 > w.io.0 {
        resources.push(&io);
    }
    if w.mem32.1 > w.mem32.0 {
        resources.push(&mem32);
    }
    if w.mem64.1 > w.mem64.0 {
        resources.push(&mem64);
    }
    let crs = crs(resources);
    let prt = prt(facts, bus);
    let mut below_bus = Vec::new();
    for f in facts.pci.functions().filter(|f| f.at.bus == bus) {
        f.device.aml(f.at, &mut below_bus);
    }
    raw(&[&Device::new(
        Path::new(&format!("PC{bus:02X}")),
        vec![
            &hid("PNP0A03"),
            &Name::new(Path::new("_ADR"), &ZERO),
            &Name::new(Path::new("_BBN"), &bus),
            &Name::new(Path::new("_UID"), &bus),
            &crs,
            &prt,
            &Raw(below_bus),
        ],
    )])
}

/// `_PRT`: links without the I/O APIC, its pins with it.
fn prt(facts: &Facts<'_>, bus: u8) -> Raw {
    let intx = intx_of(facts.pci, bus);
    if intx.is_empty() {
        return Raw(Vec::new());
    }
    let (mut apic, mut pic) = (PackageBuilder::new(), PackageBuilder::new());
    for (at, pin, route) in intx {
        let address = u32::from(at.slot) << 16 | 0xffff;
        apic.add_element(&Package::new(vec![&address, &pin, &ZERO, &route.ioapic]));
        if facts.pci.has_lpc() {
            let link = Path::new(&format!("\\_SB_.PC00.ISA_.LNK{}", letter(route.link)));
            pic.add_element(&Package::new(vec![&address, &pin, &link, &ZERO]));
        }
    }
    raw(&[
        &Name::new(Path::new("PPRT"), &pic),
        &Name::new(Path::new("APRT"), &apic),
        &Method::new(
            Path::new("_PRT"),
            0,
            false,
            vec![
                &If::new(&Path::new("PICM"), vec![&Return::new(&Path::new("APRT"))]),
                &Else::new(vec![&Return::new(&Path::new("PPRT"))]),
            ],
        ),
    ])
}

fn letter(link: u8) -> char {
    char::from(b'A' + (link & 7))
}

/// The LPC bridge with links, timers and reserved ports; serial ports are
/// added to its scope afterwards.
pub fn isa_bridge(at: Bdf, sink: &mut Vec<u8>) {
    let address = u32::from(at.slot) << 16 | u32::from(at.func);
    let region = OpRegion::new(
        Path::new("LPCR"),
        OpRegionSpace::PCIConfig,
        &ZERO,
        &0x100_u16,
    );
    let pir = |link: u8| FieldEntry::Named([b'P', b'I', b'R', b'A' + link], 8);
    let mut fields = vec![FieldEntry::Reserved(0x60 * 8)];
    fields.extend((0..4).map(pir));
    fields.push(FieldEntry::Reserved(4 * 8));
    fields.extend((4..8).map(pir));
    let fields = Field::new(
        Path::new("LPCR"),
        FieldAccessType::Any,
        FieldLockRule::NoLock,
        FieldUpdateRule::Preserve,
        fields,
    );
    let links: Vec<Raw> = (0..8).map(link).collect();
    let rtc = Device::new(
        Path::new("RTC_"),
        vec![&hid("PNP0B00"), &crs(vec![&ports(0x70, 2), &Irq(8)])],
    )
    .bytes();
    let pic = Device::new(
        Path::new("PIC_"),
        vec![
            &hid("PNP0000"),
            &crs(vec![&ports(0x20, 2), &ports(0xa0, 2), &Irq(2)]),
        ],
    )
    .bytes();
    let timer = Device::new(
        Path::new("TIMR"),
        vec![&hid("PNP0100"), &crs(vec![&ports(0x40, 4), &Irq(0)])],
    )
    .bytes();
    let (adr, valid, reserved) = (
        Name::new(Path::new("_ADR"), &address),
        link_valid(),
        reserved(),
    );
    let mut children: Vec<&dyn Aml> = vec![&adr, &region, &fields, &valid, &reserved];
    children.extend(links.iter().map(|l| l as &dyn Aml));
    children.extend([&rtc as &dyn Aml, &pic, &timer]);
    Device::new(Path::new("ISA_"), children).to_aml_bytes(sink);
}

/// Bytes of an object whose parts go out of scope.
trait Bytes: Aml {
    fn bytes(&self) -> Raw
    where
        Self: Sized,
    {
        raw(&[self])
    }
}
impl<T: Aml> Bytes for T {}

/// Ports and memory that no driver may take.
fn reserved() -> Raw {
    // Not the I/O APIC: the MADT names it, and Linux, which has it by then,
    // complains that it cannot be reserved.
    let ecam = Memory32Fixed::new(true, ECAM_BASE as u32, ECAM_SIZE as u32);
    let ports = [
        ports(0x4d0, 2),
        ports(0x61, 1),
        ports(0x72, 6),
        ports(0x80, 1),
        ports(0x84, 1),
        ports(0x92, 1),
        ports(pm::SMI_COMMAND, 1),
        ports(pm::PM1_EVENT, 8),
        ports(pm::PM_TIMER, 4),
    ];
    let mut resources: Vec<&dyn Aml> = ports.iter().map(|p| p as &dyn Aml).collect();
    resources.push(&ecam);
    Device::new(Path::new("SIO_"), vec![&hid("PNP0C02"), &crs(resources)]).bytes()
}

fn serial_ports(present: [bool; 2]) -> Vec<Raw> {
    let existing = LEGACY
        .iter()
        .zip(present)
        .enumerate()
        .filter(|(_, (_, p))| *p);
    existing
        .map(|(i, (port, _))| {
            let uid = i as u8 + 1;
            let resources = crs(vec![&ports(port.base, 8), &Irq(port.irq)]);
            Device::new(
                Path::new(port.name),
                vec![
                    &hid("PNP0501"),
                    &Name::new(Path::new("_UID"), &uid),
                    &resources,
                ],
            )
            .bytes()
        })
        .collect()
}

/// `PIRV`: whether a link register routes anywhere.
fn link_valid() -> Raw {
    let zero = || Return::new(&ZERO).bytes();
    Method::new(
        Path::new("PIRV"),
        1,
        false,
        vec![
            &If::new(&And::new(&ZERO, &Arg(0), &0x80_u8), vec![&zero()]),
            &And::new(&Local(0), &Arg(0), &0x0f_u8),
            &If::new(&LessThan::new(&Local(0), &3_u8), vec![&zero()]),
            &If::new(&Equal::new(&Local(0), &8_u8), vec![&zero()]),
            &If::new(&Equal::new(&Local(0), &13_u8), vec![&zero()]),
            &Return::new(&ONE),
        ],
    )
    .bytes()
}

/// An interrupt link device (ACPI 6.5 §6.2.13).
fn link(index: u8) -> Raw {
    let register = || Path::new(&format!("PIR{}", letter(index)));
    let buffer = || Path::new(&format!("CB{:02X}", index + 1));
    let word = || Path::new(&format!("CIR{}", letter(index)));
    let wanted = || Path::new(&format!("SIR{}", letter(index)));
    let valid = MethodCall::new(Path::new("PIRV"), vec![&register()]).bytes();
    let status = Method::new(
        Path::new("_STA"),
        0,
        false,
        vec![
            &If::new(&valid, vec![&Return::new(&0x0b_u8)]),
            &Else::new(vec![&Return::new(&0x09_u8)]),
        ],
    )
    .bytes();
    let possible = Name::new(
        Path::new("_PRS"),
        &ResourceTemplate::new(vec![&LevelIrqs(PERMITTED)]),
    );
    let current = Name::new(buffer(), &ResourceTemplate::new(vec![&LevelIrqs(0)]));
    let field = create_word_field(&buffer(), 1, word());
    let get = Method::new(
        Path::new("_CRS"),
        0,
        false,
        vec![
            &And::new(&Local(0), &register(), &0x8f_u8),
            &If::new(
                &MethodCall::new(Path::new("PIRV"), vec![&Local(0)]),
                vec![&ShiftLeft::new(&word(), &ONE, &Local(0))],
            ),
            &Else::new(vec![&Store::new(&word(), &ZERO)]),
            &Return::new(&buffer()),
        ],
    )
    .bytes();
    let disable = Method::new(
        Path::new("_DIS"),
        0,
        false,
        vec![&Store::new(&register(), &0x80_u8)],
    )
    .bytes();
    let set = Method::new(
        Path::new("_SRS"),
        1,
        false,
        vec![
            &create_word_field(&Arg(0), 1, wanted()),
            &find_set_right_bit(&wanted(), &Local(0)),
            // Decrement.
            &Raw(vec![0x76, 0x60]),
            &Store::new(&register(), &Local(0)),
        ],
    )
    .bytes();
    Device::new(
        Path::new(&format!("LNK{}", letter(index))),
        vec![
            &hid("PNP0C0F"),
            &Name::new(Path::new("_UID"), &(index + 1)),
            &status,
            &possible,
            &current,
            &field,
            &get,
            &disable,
            &set,
        ],
    )
    .bytes()
}
