//! Memory-type range registers (SDM Vol. 3A §11.11). Memory of the guest is
//! write-back in the nested tables whatever they say; they are kept, checked
//! and read back, because guests configure themselves by them.

use super::number::*;

/// Pairs of variable-range registers.
const VARIABLE: usize = 10;
/// IA32_MTRRCAP: VCNT, FIX, WC.
const CAP: u64 = VARIABLE as u64 | 1 << 8 | 1 << 10;
/// IA32_MTRR_DEF_TYPE: E, FE.
const DEF_ENABLE: u64 = 1 << 11 | 1 << 10;
const UC: u64 = 0;
const WB: u64 = 6;
const VALID: u64 = 1 << 11;
/// Where bhyve ends low memory and puts 32-bit PCI and device windows, up to
/// 4 GiB.
const DEVICE_HOLE: u64 = 0xc000_0000;

#[derive(Clone, Debug)]
pub(super) struct Mtrrs {
    def_type: u64,
    /// 64K, 16K × 2, 4K × 8.
    fixed: [u64; 11],
    /// Base and mask in turn, as the MSRs are numbered.
    var: [u64; VARIABLE * 2],
    /// Bits of a physical address.
    phys_mask: u64,
}

/// UC, WC, WT, WP, WB.
const fn type_valid(t: u8) -> bool {
    matches!(t, 0 | 1 | 4 | 5 | 6)
}

impl Mtrrs {
    /// As firmware leaves them: everything write-back except the VGA window
    /// and the device hole below 4 GiB.
    pub(super) fn new(phys_bits: u8) -> Self {
        let phys_mask = (1u64 << phys_bits.clamp(32, 52)) - 1;
        let mut fixed = [WB * 0x0101_0101_0101_0101; 11];
        fixed[2] = UC; // 0xA0000–0xBFFFF
        let mut var = [0; VARIABLE * 2];
        var[0] = DEVICE_HOLE | UC;
        var[1] = phys_mask & !((1 << 30) - 1) | VALID;
        Mtrrs {
            def_type: DEF_ENABLE | WB,
            fixed,
            var,
            phys_mask,
        }
    }

    pub(super) fn read(&self, msr: u32) -> Option<u64> {
        match msr {
            MTRR_CAP => Some(CAP),
            MTRR_DEF_TYPE => Some(self.def_type),
            MTRR_VAR_FIRST..=MTRR_VAR_LAST => {
                self.var.get((msr - MTRR_VAR_FIRST) as usize).copied()
            }
            _ => self.fixed.get(fixed_index(msr)?).copied(),
        }
    }

    /// False for #GP: a reserved bit or a reserved type.
    pub(super) fn write(&mut self, msr: u32, value: u64) -> bool {
        match msr {
            MTRR_DEF_TYPE => {
                if value & !(DEF_ENABLE | 0xff) != 0 || !type_valid(value as u8) {
                    return false;
                }
                self.def_type = value;
            }
            MTRR_VAR_FIRST..=MTRR_VAR_LAST => {
                let n = msr - MTRR_VAR_FIRST;
                let ok = if n & 1 == 0 {
                    value & !(self.phys_mask & !0xfff | 0xff) == 0 && type_valid(value as u8)
                } else {
                    value & !(self.phys_mask & !0xfff | VALID) == 0
                };
                if !ok {
                    return false;
                }
                if let Some(r) = self.var.get_mut(n as usize) {
                    *r = value;
                }
            }
            _ => {
                let Some(r) = fixed_index(msr).and_then(|i| self.fixed.get_mut(i)) else {
                    return false;
                };
                if !value.to_le_bytes().into_iter().all(type_valid) {
                    return false;
                }
                *r = value;
            }
        }
        true
    }
}

fn fixed_index(msr: u32) -> Option<usize> {
    let i = match msr {
        MTRR_FIX64K => 0,
        MTRR_FIX16K_FIRST | MTRR_FIX16K_LAST => 1 + (msr - MTRR_FIX16K_FIRST),
        MTRR_FIX4K_FIRST..=MTRR_FIX4K_LAST => 3 + (msr - MTRR_FIX4K_FIRST),
        _ => return None,
    };
    Some(i as usize)
}
