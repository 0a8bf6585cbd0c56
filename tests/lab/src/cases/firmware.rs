//! Firmware in place of a loaded kernel: a ROM of our own, started by the reset.

use crate::host::{Host, SHORT};
use crate::runner::{Case, Lab};
use anyhow::{Result, ensure};
use std::fmt::Write;

/// In 16-bit mode from the ROM's first byte, which is at CS:F000.
const CODE: &[u8] = &[
    0xbe, 0x00, 0xf1, // mov si, f100: the text
    0xba, 0xf8, 0x03, // mov dx, 3f8: COM1
    // Each byte of the text:
    0x2e, 0xac, // cs lodsb
    0x84, 0xc0, // test al, al
    0x74, 0x03, // jz
    0xee, // out dx, al
    0xeb, 0xf7, // jmp
    // Who is the hypervisor? Four letters.
    0xba, 0x10, 0x05, // mov dx, 510
    0x31, 0xc0, // xor ax, ax
    0xef, // out dx, ax
    0xb9, 0x04, 0x00, // mov cx, 4
    0xba, 0x11, 0x05, // mov dx, 511
    0xec, // in al, dx
    0xba, 0xf8, 0x03, // mov dx, 3f8
    0xee, // out dx, al
    0xe2, 0xf6, // loop
    // The flash below: its status, as a digit, and a byte that it keeps.
    0x2e, 0xc6, 0x06, 0x00, 0xe0, 0x50, // mov byte [cs:e000], 50
    0x2e, 0x8a, 0x06, 0x00, 0xe0, // mov al, [cs:e000]
    0x04, 0x30, // add al, '0'
    0xee, // out dx, al
    0x2e, 0xc6, 0x06, 0x00, 0xe0, 0x10, // mov byte [cs:e000], 10
    0x2e, 0xc6, 0x06, 0x00, 0xe0, b'!', // mov byte [cs:e000], '!'
    0x2e, 0x8a, 0x06, 0x00, 0xe0, // mov al, [cs:e000]
    0xee, // out dx, al
    0xb0, b'\n', // mov al, '\n'
    0xee,  // out dx, al
    // ACPI's S5.
    0xba, 0x04, 0x04, // mov dx, 404
    0xb8, 0x00, 0x34, // mov ax, SLP_EN | 5 << 10
    0xef, // out dx, ax
    0xf4, // hlt
];
/// At the ROM's last 16 bytes: jmp f000.
const VECTOR: &[u8] = &[0xe9, 0x0d, 0xf0];
const TEXT: &[u8] = b"ROM ";

/// The test, for any host.
pub fn case() -> Case {
    Case::new("firmware-from-the-reset-vector", boot)
}

/// Writes bytes into a file of the host.
fn put(host: &mut Host, file: &str, at: usize, bytes: &[u8]) -> Result<()> {
    let mut text = String::new();
    for byte in bytes {
        let _ = write!(text, "\\{byte:03o}");
    }
    let dd = format!("dd of={file} bs=1 seek={at} conv=notrunc 2>/dev/null");
    host.must(&format!("printf '{text}' | {dd}"), SHORT)?;
    Ok(())
}

fn boot(_: &Lab, host: &mut Host) -> Result<()> {
    for file in ["/rom", "/vars"] {
        host.must(
            &format!("dd if=/dev/zero of={file} bs=4096 count=1 2>/dev/null"),
            SHORT,
        )?;
    }
    put(host, "/rom", 0, CODE)?;
    put(host, "/rom", 0x100, TEXT)?;
    put(host, "/rom", 0xff0, VECTOR)?;
    let run = "bhyve -A -H -m 64M -s 0,hostbridge -s 31,lpc -l com1,file:/com1 \
               -l bootrom,/rom,/vars rom 2>&1";
    // The second time the VM is there already, and the flash is not empty.
    for _ in 0..2 {
        host.must("rm -f /com1", SHORT)?;
        let ended = host.run(run, SHORT)?;
        ensure!(
            ended.status == 1,
            "powered off is 1, not {}: {}",
            ended.status,
            ended.text
        );
        let said = host.must("cat /com1", SHORT)?;
        ensure!(said.trim() == "ROM BHYV0!", "the ROM says {said:?}");
    }
    // The flash's file has kept the byte.
    host.must("head -c 1 /vars | grep -q '!'", SHORT)?;
    host.must("bhyvectl --vm=rom --destroy", SHORT)?;
    Ok(())
}
