//! seccomp(2) and landlock(7).

use crate::{Error, Needs, Report, calls};
use landlock::{
    ABI, Access, AccessFs, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreated, RulesetCreatedAttr, RulesetStatus,
};
use libc::c_long;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch, sock_filter,
};
use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Read};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::OnceLock;

/// What Landlock is asked for; older kernels give what they have of it.
const LANDLOCK: ABI = ABI::V5;

/// ioctl(2) requests that type into a terminal; libc has them as different types in
/// different C libraries.
const TIOCSTI: u32 = 0x5412;
const TIOCLINUX: u32 = 0x541c;
/// The kind of system calls (linux/audit.h): not x32, not 32-bit.
const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;

/// The rules for paths, for threads that come under them later.
static PATHS: OnceLock<RulesetCreated> = OnceLock::new();

fn fail(what: impl std::fmt::Display) -> Error {
    Error(what.to_string())
}

pub fn limit(_: BorrowedFd<'_>, _: crate::Purpose<'_>) -> io::Result<()> {
    Ok(())
}

pub fn enter(needs: &Needs, refused: Box<dyn Fn(&str) + Send>) -> Result<Report, Error> {
    let mut report = Report::default();
    report_to(refused)?;
    let rules = paths(needs)?;
    let kept = rules.try_clone().map_err(fail)?;
    let status = rules.restrict_self().map_err(fail)?;
    match status.ruleset {
        RulesetStatus::NotEnforced => report
            .lacking
            .push("no Landlock: the kernel has none, or has it switched off".into()),
        _ => {
            let _ = PATHS.set(kept);
        }
    }
    seccompiler::apply_filter_all_threads(&filter(needs)?).map_err(fail)?;
    Ok(report)
}

pub fn join() -> Result<(), Error> {
    if let Some(rules) = PATHS.get() {
        rules
            .try_clone()
            .map_err(fail)?
            .restrict_self()
            .map_err(fail)?;
    }
    Ok(())
}

/// A thread that tells of each refused call.
fn report_to(refused: Box<dyn Fn(&str) + Send>) -> Result<(), Error> {
    let (mut reader, writer) = std::io::pipe().map_err(fail)?;
    vmmapi::confine::on_refused_call(OwnedFd::from(writer)).map_err(fail)?;
    std::thread::Builder::new()
        .name("sandbox".into())
        .stack_size(64 << 10)
        .spawn(move || {
            let mut call = [0; 4];
            while reader.read_exact(&mut call).is_ok() {
                refused(&calls::name(i32::from_ne_bytes(call)));
            }
        })
        .map_err(fail)?;
    Ok(())
}

fn paths(needs: &Needs) -> Result<RulesetCreated, Error> {
    let mut rules = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(LANDLOCK))
        .map_err(fail)?
        .create()
        .map_err(fail)?;
    let read = AccessFs::from_read(LANDLOCK) & !AccessFs::Execute;
    let write = AccessFs::from_all(LANDLOCK) & !AccessFs::Execute;
    for (path, writable) in files(needs) {
        let access = if writable { write } else { read };
        // What is not there cannot be opened either.
        if let Ok(fd) = PathFd::new(path) {
            rules = rules
                .add_rule(PathBeneath::new(fd, access))
                .map_err(|e| fail(format!("{}: {e}", path.display())))?;
        }
    }
    Ok(rules)
}

/// Everything that is to be opened, and whether to be changed.
fn files(needs: &Needs) -> impl Iterator<Item = (&PathBuf, bool)> {
    let read = needs.read.iter().map(|p| (p, false));
    let write = needs.write.iter().map(|p| (p, true));
    let folders = needs.folders.iter().map(|(p, w)| (p, *w));
    read.chain(write).chain(folders)
}

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

/// Allows a call where an argument compares so.
fn where_argument(index: u8, op: SeccompCmpOp, value: u64) -> Result<SeccompCondition, Error> {
    SeccompCondition::new(index, SeccompCmpArgLen::Dword, op, value).map_err(fail)
}

fn rule(conditions: Vec<SeccompCondition>) -> Result<SeccompRule, Error> {
    SeccompRule::new(conditions).map_err(fail)
}

fn filter(needs: &Needs) -> Result<BpfProgram, Error> {
    let mut allowed: Vec<c_long> = calls::ALWAYS.to_vec();
    if files(needs).next().is_some() {
        allowed.extend(calls::READ);
    }
    if files(needs).any(|(_, writable)| writable) {
        allowed.extend(calls::WRITE);
    }
    let mut rules = Rules::new();
    if needs.network || needs.unix {
        allowed.extend(calls::SOCKETS);
        let mut kinds = Vec::new();
        let families = [
            (needs.network, libc::AF_INET),
            (needs.network, libc::AF_INET6),
            (needs.unix, libc::AF_UNIX),
        ];
        for (_, family) in families.iter().filter(|(wanted, _)| *wanted) {
            kinds.push(rule(vec![where_argument(
                0,
                SeccompCmpOp::Eq,
                *family as u64,
            )?])?);
        }
        rules.insert(libc::SYS_socket, kinds);
    }
    let not_executable = SeccompCmpOp::MaskedEq(libc::PROT_EXEC as u64);
    for call in [libc::SYS_mmap, libc::SYS_mprotect] {
        if needs.executable_memory {
            allowed.push(call);
        } else {
            let condition = where_argument(2, not_executable.clone(), 0)?;
            rules.insert(call, vec![rule(vec![condition])?]);
        }
    }
    // Threads, no processes.
    let thread = libc::CLONE_THREAD as u64;
    rules.insert(
        libc::SYS_clone,
        vec![rule(vec![where_argument(
            0,
            SeccompCmpOp::MaskedEq(thread),
            thread,
        )?])?],
    );
    // PR_SET_NO_NEW_PRIVS comes with Landlock, PR_SET_VMA with glibc's names of
    // memory.
    let options = [
        libc::PR_SET_NAME,
        libc::PR_SET_NO_NEW_PRIVS,
        libc::PR_SET_VMA,
    ];
    let mut kinds = Vec::new();
    for option in options {
        kinds.push(rule(vec![where_argument(
            0,
            SeccompCmpOp::Eq,
            option as u64,
        )?])?);
    }
    rules.insert(libc::SYS_prctl, kinds);
    let rules = SeccompFilter::new(
        rules,
        SeccompAction::Trap,
        SeccompAction::Allow,
        TargetArch::x86_64,
    );
    let rules: BpfProgram = rules.map_err(fail)?.try_into().map_err(fail)?;
    let mut program = first(&by_number(&allowed)?);
    program.extend(rules);
    Ok(program)
}

/// Classic BPF on struct seccomp_data: nr at 0, arch at 4, args[1] at 24.
const fn instruction(code: u32, jt: u8, jf: u8, k: u32) -> sock_filter {
    sock_filter {
        code: code as u16,
        jt,
        jf,
        k,
    }
}

const fn load(at: u32) -> sock_filter {
    instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, at)
}

/// Skips so many instructions if equal, or if not.
const fn equal(k: u32, yes: u8, no: u8) -> sock_filter {
    instruction(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, yes, no, k)
}

/// Skips so many instructions if not below.
const fn at_least(k: u32, yes: u8) -> sock_filter {
    instruction(libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K, yes, 0, k)
}

/// Skips so many instructions.
const fn skip(k: usize) -> sock_filter {
    instruction(libc::BPF_JMP | libc::BPF_JA, 0, 0, k as u32)
}

const fn answer(k: u32) -> sock_filter {
    instruction(libc::BPF_RET | libc::BPF_K, 0, 0, k)
}

/// What comes before the rules, which look at arguments. lseek and ioctl, which run
/// the guest, are answered at once, then the calls of which the number is enough:
/// `numbers` has [`by_number`]'s instructions. (From Linux 5.11 on the kernel finds
/// out beforehand which these are, by executing the filter in its mind for every
/// number there is, and does not execute it for them at all: a short way through it
/// is for the sake of that, too.)
/// clone3's flags are behind a pointer, where no filter can look: it is told to be
/// unknown, and the C library takes clone.
fn first(numbers: &[sock_filter]) -> BpfProgram {
    let mut program = vec![
        load(4),
        // Calls of other kinds are the rules' to refuse.
        equal(AUDIT_ARCH_X86_64, 1, 0),
        skip(numbers.len() + 10),
        load(0),
        equal(libc::SYS_lseek as u32, 6, 0),
        equal(libc::SYS_ioctl as u32, 2, 0),
        equal(libc::SYS_clone3 as u32, 0, 6),
        answer(libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32),
        // On any open file, but not to type into the terminal that we run on.
        load(24),
        equal(TIOCSTI, 2, 0),
        equal(TIOCLINUX, 1, 0),
        answer(libc::SECCOMP_RET_ALLOW),
        skip(numbers.len()),
    ];
    program.extend_from_slice(numbers);
    program
}

/// Instructions that allow the call whose number is loaded if it is one of these, by
/// binary search, and go on behind themselves if not.
fn by_number(allowed: &[c_long]) -> Result<BpfProgram, Error> {
    let set: BTreeSet<u32> = allowed.iter().map(|c| *c as u32).collect();
    // Where the answer changes: at the first number of each run, and behind its last.
    let mut edges = Vec::new();
    for &n in &set {
        if edges.last() == Some(&n) {
            edges.pop();
        } else {
            edges.push(n);
        }
        edges.push(n + 1);
    }
    let mut program = Vec::new();
    search(&edges, false, &mut program)?;
    let len = program.len();
    for (at, i) in program.iter_mut().enumerate() {
        if *i == skip(0) {
            *i = skip(len - at - 1);
        }
    }
    Ok(program)
}

/// Appends the search among `edges`; below the first of them the answer is
/// `allowed`. A `skip(0)` stands for the way out.
fn search(edges: &[u32], allowed: bool, program: &mut BpfProgram) -> Result<(), Error> {
    let middle = edges.len() / 2;
    let (below, above) = edges.split_at(middle);
    let Some((edge, above)) = above.split_first() else {
        program.push(if allowed {
            answer(libc::SECCOMP_RET_ALLOW)
        } else {
            skip(0)
        });
        return Ok(());
    };
    let at = program.len();
    program.push(at_least(*edge, 0));
    search(below, allowed, program)?;
    let left = program.len() - at - 1;
    // Far from it: the calls are a few dozen runs of numbers.
    let left = u8::try_from(left).map_err(|_| fail("too many system calls"))?;
    program[at] = at_least(*edge, left);
    search(above, allowed ^ middle.is_multiple_of(2), program)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whether the program allows a call, and if not, whether it fell off its end.
    fn run(program: &[sock_filter], number: u32) -> bool {
        let mut at = 0;
        while let Some(i) = program.get(at) {
            at += 1;
            match u32::from(i.code) {
                c if c == libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K => {
                    at += usize::from(if number >= i.k { i.jt } else { i.jf });
                }
                c if c == libc::BPF_JMP | libc::BPF_JA => at += i.k as usize,
                c if c == libc::BPF_RET | libc::BPF_K => {
                    assert_eq!(i.k, libc::SECCOMP_RET_ALLOW);
                    return true;
                }
                other => panic!("instruction {other:#x}"),
            }
        }
        assert_eq!(at, program.len(), "out of the program");
        false
    }

    #[test]
    fn numbers_are_found_by_halves() {
        let everything: Vec<c_long> =
            [calls::ALWAYS, calls::READ, calls::WRITE, calls::SOCKETS].concat();
        for allowed in [calls::ALWAYS, &everything, &[], &[0], &[7, 8, 9]] {
            let program = by_number(allowed).unwrap();
            for n in (0..600).chain([u32::MAX]) {
                let wanted = allowed.contains(&c_long::from(n));
                assert_eq!(run(&program, n), wanted, "call {n} of {}", allowed.len());
            }
        }
    }
}
