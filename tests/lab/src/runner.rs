//! Runs lab tests: several to a host boot, two hosts at a time, a line a test.

use crate::cases;
use crate::dirs::Dirs;
use crate::host::{Config, Host, Kit, SHORT};
use crate::host_kernel::HostKernel;
use crate::machine::{Engine, Machine, Pci, Spec};
use anyhow::{Result, ensure};
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// What tests may use.
#[derive(Debug)]
pub struct Lab {
    /// The directories.
    pub dirs: Dirs,
    /// What is in every host.
    pub kit: Kit,
    /// What runs the hosts.
    pub engine: Engine,
}

impl Lab {
    /// Starts a kernel without a host around it: the bare emulator as oracle.
    ///
    /// # Errors
    /// The emulator does not start.
    pub fn bare(&self, name: &str, engine: Engine, cpus: u32, cmdline: &str) -> Result<Machine> {
        let HostKernel { image, .. } = &self.kit.kernel;
        let spec = Spec {
            engine,
            cpus,
            memory_mib: 512,
            count_instructions: false,
            pci: Pci::default(),
            disk: None,
            kernel: image.clone(),
            initramfs: std::fs::read(&self.kit.guest_initrd)?,
            cmdline: format!("{cmdline} {}", engine.kernel_parameters()),
        };
        Machine::start(&spec, &self.dirs.fresh(name)?)
    }
}

/// What a test does.
pub type Body = Box<dyn Fn(&Lab, &mut Host) -> Result<()> + Send + Sync>;

/// One lab test.
pub struct Case {
    /// Its name, as shown and as selected by.
    pub name: String,
    /// Why it cannot be run here, if so.
    pub skipped: Option<String>,
    /// The test itself. The module is loaded; whatever VMs it makes it removes.
    pub body: Body,
}

impl fmt::Debug for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Case").field("name", &self.name).finish()
    }
}

impl Case {
    /// A test that can always be run.
    pub fn new(
        name: impl Into<String>,
        body: impl Fn(&Lab, &mut Host) -> Result<()> + Send + Sync + 'static,
    ) -> Self {
        Self {
            name: name.into(),
            skipped: None,
            body: Box::new(body),
        }
    }

    /// A test that cannot be run here.
    pub fn skipped(name: impl Into<String>, why: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            skipped: Some(why.into()),
            body: Box::new(|_, _| Ok(())),
        }
    }
}

/// Tests that share a host.
#[derive(Debug)]
pub struct Group {
    /// Name of the host's directory.
    pub name: String,
    /// The host.
    pub config: Config,
    /// Tests, in order.
    pub cases: Vec<Case>,
}

/// How many tests ended how.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Tally {
    /// Succeeded.
    pub passed: u32,
    /// Failed.
    pub failed: u32,
    /// Not run, with a reason given.
    pub skipped: u32,
}

impl std::ops::AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            passed,
            failed,
            skipped,
        } = self;
        write!(f, "{passed} passed, {failed} failed, {skipped} skipped")
    }
}

/// Hosts at a time.
const WORKERS: usize = 2;

/// Runs the lab tests whose name contains `only`, a line each.
///
/// # Errors
/// The list of tests cannot be made; failures of tests are in the tally.
pub fn run(lab: &Lab, only: &str) -> Result<Tally> {
    let mut groups = cases::all(lab)?;
    for group in &mut groups {
        group.cases.retain(|c| c.name.contains(only));
        for case in &mut group.cases {
            let mut unfit = cases::unfit(lab.engine).iter();
            if let Some((_, why)) = unfit.find(|(name, _)| *name == case.name) {
                case.skipped = Some(format!("on {}: {why}", lab.engine));
            }
        }
    }
    groups.retain(|g| !g.cases.is_empty());
    ensure!(!groups.is_empty(), "no lab test has {only:?} in its name");
    groups.reverse();
    let queue = Mutex::new(groups);
    let tally = Mutex::new(Tally::default());
    std::thread::scope(|scope| {
        for _ in 0..WORKERS {
            scope.spawn(|| {
                loop {
                    let next = queue.lock().unwrap_or_else(PoisonError::into_inner).pop();
                    let Some(group) = next else {
                        return;
                    };
                    let part = run_group(lab, &group);
                    *tally.lock().unwrap_or_else(PoisonError::into_inner) += part;
                }
            });
        }
    });
    let tally = *tally.lock().unwrap_or_else(PoisonError::into_inner);
    Ok(tally)
}

fn run_group(lab: &Lab, group: &Group) -> Tally {
    let mut tally = Tally::default();
    let mut host: Option<Host> = None;
    for (number, case) in group.cases.iter().enumerate() {
        if let Some(why) = &case.skipped {
            println!("{}: skipped: {why}", case.name);
            tally.skipped += 1;
            continue;
        }
        let started = Instant::now();
        let result = (|| {
            let host = match &mut host {
                Some(host) => host,
                None => {
                    // A number, so that a failed host's transcripts stay.
                    let name = format!("{}-{number}", group.name);
                    let kit = match &group.config.freebsd {
                        None => &lab.kit,
                        Some(image) => &Kit::build_freebsd(&lab.dirs, image)?,
                    };
                    host.insert(Host::boot(&lab.dirs, kit, &group.config, &name)?)
                }
            };
            run_case(lab, case, host)
        })();
        let seconds = started.elapsed().as_secs_f64();
        match result {
            Ok(()) => {
                println!("{}: ok ({seconds:.1} s)", case.name);
                tally.passed += 1;
                if host.as_ref().is_some_and(Host::is_gone) {
                    host = None;
                }
            }
            Err(e) => {
                println!(
                    "{}: FAILED ({seconds:.1} s)\n    {}",
                    case.name,
                    format!("{e:#}").replace('\n', "\n    ")
                );
                tally.failed += 1;
                // The next test deserves a host that nothing has happened to.
                host = None;
            }
        }
    }
    tally
}

/// The module goes in before and out after each test, and nothing stays behind.
fn run_case(lab: &Lab, case: &Case, host: &mut Host) -> Result<()> {
    host.load_vmm("")?;
    (case.body)(lab, host)?;
    if host.is_gone() {
        return Ok(());
    }
    let nodes = host.must("ls /dev/vmm 2>/dev/null || true", SHORT)?;
    ensure!(
        nodes.trim().is_empty(),
        "VMs are left in /dev/vmm: {}",
        nodes.trim()
    );
    host.unload_vmm()?;
    host.no_complaints()
}

/// Waits for `what` to happen, looking every 200 ms.
///
/// # Errors
/// It has not within `timeout`, or looking fails.
pub fn eventually(
    what: &str,
    timeout: Duration,
    mut look: impl FnMut() -> Result<bool>,
) -> Result<()> {
    let deadline = Instant::now() + timeout;
    while !look()? {
        ensure!(
            Instant::now() < deadline,
            "not within {} s: {what}",
            timeout.as_secs()
        );
        std::thread::sleep(Duration::from_millis(200));
    }
    Ok(())
}

/// A value that several tests want and the first computes.
#[derive(Debug, Clone)]
pub struct Shared<T>(Arc<Mutex<Option<T>>>);

impl<T: Clone> Default for Shared<T> {
    fn default() -> Self {
        Self(Arc::new(Mutex::new(None)))
    }
}

impl<T: Clone> Shared<T> {
    /// The value, made by `make` if it is not there yet.
    ///
    /// # Errors
    /// Those of `make`.
    pub fn get(&self, make: impl FnOnce() -> Result<T>) -> Result<T> {
        let mut slot = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(value) = &*slot {
            return Ok(value.clone());
        }
        let value = make()?;
        *slot = Some(value.clone());
        Ok(value)
    }
}
