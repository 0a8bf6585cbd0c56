//! Counts what failed, and says so.

use crate::println;

/// The checks of one guest.
#[derive(Debug)]
pub struct Report {
    name: &'static str,
    checks: u32,
    failures: u32,
}

impl Report {
    /// No checks yet, and the console set up.
    pub fn new(name: &'static str) -> Self {
        crate::serial::init();
        Self {
            name,
            checks: 0,
            failures: 0,
        }
    }

    /// One check.
    pub fn check(&mut self, what: &str, good: bool) -> bool {
        self.checks += 1;
        if !good {
            self.failures += 1;
        }
        let word = if good { "ok" } else { "FAIL" };
        println!("{}: {what} ... {word}", self.name);
        good
    }

    /// One check of a value, which is printed if it is wrong.
    pub fn equal(&mut self, what: &str, is: u64, wanted: u64) -> bool {
        if is != wanted {
            println!("{}: {what}: is {is:#x}, wanted {wanted:#x}", self.name);
        }
        self.check(what, is == wanted)
    }

    /// Says that something is not tested here, and why.
    pub fn skip(&self, what: &str, why: &str) {
        println!("{}: {what} ... skipped: {why}", self.name);
    }

    /// Prints the verdict and powers off.
    pub fn finish(self) -> ! {
        println!(
            "{}: {} checks, {} failed",
            self.name, self.checks, self.failures
        );
        println!(
            "{}",
            if self.failures == 0 && self.checks > 0 {
                "PASS"
            } else {
                "FAIL"
            }
        );
        crate::power_off()
    }
}
