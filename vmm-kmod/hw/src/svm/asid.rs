//! Address-space identifiers (APM Vol. 2 §15.16): each CPU hands them out in
//! order; when they are used up a new generation begins, and every vCPU takes
//! a new one.

/// A CPU's identifiers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Asids {
    generation: u64,
    next: u32,
    /// One more than the highest.
    limit: u32,
}

/// An identifier, as long as the generation lasts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Asid {
    /// 0: none yet.
    pub generation: u64,
    /// 1 to the highest; 0 is the host's own.
    pub number: u32,
}

impl Asids {
    /// All free; `limit` (CPUID 8000_000AH:EBX) counts 0, the host's.
    pub const fn new(limit: u32) -> Self {
        Asids {
            generation: 1,
            next: 1,
            limit: if limit < 2 { 2 } else { limit },
        }
    }

    /// Nothing that was handed out is good any more.
    pub fn restart(&mut self) {
        self.generation += 1;
        self.next = 1;
    }

    /// Whether the identifier may still be used.
    pub const fn valid(&self, a: Asid) -> bool {
        a.generation == self.generation
    }

    /// A new identifier. True: it is the first of a generation, so the CPU may
    /// hold translations of an older one under this and all others.
    pub fn take(&mut self) -> (Asid, bool) {
        if self.next >= self.limit {
            self.next = 1;
            self.generation += 1;
        }
        let number = self.next;
        self.next += 1;
        let asid = Asid {
            generation: self.generation,
            number,
        };
        (asid, number == 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_not_shared_within_a_generation() {
        let mut cpu = Asids::new(4);
        let (a, first) = cpu.take();
        assert!(first && a.number == 1 && cpu.valid(a));
        let (b, first) = cpu.take();
        assert!(!first && b.number == 2);
        let (c, _) = cpu.take();
        assert_eq!(c.number, 3);
        assert!(cpu.valid(a) && cpu.valid(b));
        // 4 is out of range: everybody starts again, after a flush of all.
        let (d, first) = cpu.take();
        assert!(first && d.number == 1);
        assert!(!cpu.valid(a) && !cpu.valid(b) && cpu.valid(d));
        assert!(!cpu.valid(Asid::default()));
        cpu.restart();
        assert!(!cpu.valid(d));
        assert!(cpu.take().1);
    }

    #[test]
    fn a_cpu_with_a_single_identifier_flushes_each_time() {
        let mut cpu = Asids::new(0);
        assert!(cpu.take().1);
        assert!(cpu.take().1);
    }
}
