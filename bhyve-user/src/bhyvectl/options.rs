//! The command line: long options as getopt_long(3) takes them, `--name=value`
//! or `--name value`, abbreviated where that is unambiguous.

use super::fields;
use std::collections::BTreeMap;
use vmmapi::RegName::{self, *};

/// Registers, in the order in which stock bhyvectl prints them.
pub(super) const REGISTERS: &[(&str, RegName)] = &[
    ("efer", Efer),
    ("cr0", Cr0),
    ("cr2", Cr2),
    ("cr3", Cr3),
    ("cr4", Cr4),
    ("dr0", Dr0),
    ("dr1", Dr1),
    ("dr2", Dr2),
    ("dr3", Dr3),
    ("dr6", Dr6),
    ("dr7", Dr7),
    ("rsp", Rsp),
    ("rip", Rip),
    ("rax", Rax),
    ("rbx", Rbx),
    ("rcx", Rcx),
    ("rdx", Rdx),
    ("rsi", Rsi),
    ("rdi", Rdi),
    ("rbp", Rbp),
    ("r8", R8),
    ("r9", R9),
    ("r10", R10),
    ("r11", R11),
    ("r12", R12),
    ("r13", R13),
    ("r14", R14),
    ("r15", R15),
    ("rflags", Rflags),
];

/// Descriptors, likewise.
pub(super) const DESCRIPTORS: &[(&str, RegName)] = &[
    ("ds", Ds),
    ("es", Es),
    ("fs", Fs),
    ("gs", Gs),
    ("ss", Ss),
    ("cs", Cs),
    ("tr", Tr),
    ("ldtr", Ldtr),
    ("gdtr", Gdtr),
    ("idtr", Idtr),
];

/// Selectors, likewise.
pub(super) const SELECTORS: &[(&str, RegName)] = &[
    ("cs", Cs),
    ("ds", Ds),
    ("es", Es),
    ("fs", Fs),
    ("gs", Gs),
    ("ss", Ss),
    ("tr", Tr),
    ("ldtr", Ldtr),
];

/// Options without a table: name, and what their argument is called.
const OTHERS: &[(&str, Option<&str>)] = &[
    ("vm", Some("vmname")),
    ("cpu", Some("vcpu_number")),
    ("create", None),
    ("destroy", None),
    ("get-all", None),
    ("get-stats", None),
    ("run", None),
    ("capname", Some("capname")),
    ("getcap", None),
    ("setcap", Some("0|1")),
    ("desc-base", Some("BASE")),
    ("desc-limit", Some("LIMIT")),
    ("desc-access", Some("ACCESS")),
    ("set-x2apic-state", Some("state")),
    ("get-x2apic-state", None),
    ("unassign-pptdev", Some("bus/slot/func")),
    ("set-mem", Some("memory in units of MB")),
    ("get-lowmem", None),
    ("get-highmem", None),
    ("get-memseg", None),
    ("get-memmap", None),
    ("get-gpa-pmap", Some("gpa")),
    ("assert-lapic-lvt", Some("pin")),
    ("inject-nmi", None),
    ("force-reset", None),
    ("force-poweroff", None),
    ("get-rtc-time", None),
    ("set-rtc-time", Some("secs")),
    ("get-rtc-nvram", None),
    ("set-rtc-nvram", Some("val")),
    ("rtc-nvram-offset", Some("offset")),
    ("get-active-cpus", None),
    ("get-suspended-cpus", None),
    ("get-debug-cpus", None),
    ("get-intinfo", None),
    ("get-cpu-topology", None),
    ("help", None),
];

/// Every option with the name of its argument.
fn all() -> Vec<(String, Option<String>)> {
    let mut list: Vec<(String, Option<String>)> = OTHERS
        .iter()
        .map(|(n, a)| ((*n).to_owned(), a.map(str::to_owned)))
        .collect();
    for (name, _) in REGISTERS.iter().chain(SELECTORS) {
        list.push((format!("set-{name}"), Some(name.to_uppercase())));
        list.push((format!("get-{name}"), None));
    }
    for (name, _) in DESCRIPTORS {
        list.push((format!("set-desc-{name}"), None));
        list.push((format!("get-desc-{name}"), None));
    }
    list.extend(fields::GROUPS.iter().map(|g| (g.option.to_owned(), None)));
    list
}

/// The list of options, as stock prints it.
pub fn usage() -> String {
    let mut text = String::from("Usage: bhyvectl --vm=<vmname>\n");
    for (name, arg) in all().iter().skip(1) {
        let arg = arg.as_ref().map_or_else(String::new, |a| format!("=<{a}>"));
        text.push_str(&format!("       [--{name}{arg}]\n"));
    }
    text
}

/// What was given.
#[derive(Debug, Default)]
pub(super) struct Given(BTreeMap<String, Option<String>>);

impl Given {
    pub(super) fn has(&self, option: &str) -> bool {
        self.0.contains_key(option)
    }

    pub(super) fn text(&self, option: &str) -> Option<&str> {
        self.0.get(option)?.as_deref()
    }

    /// Whether there is nothing else.
    pub(super) fn only(&self, options: &[&str]) -> bool {
        self.0.keys().all(|k| options.contains(&k.as_str()))
    }

    /// A number in C's notation: 0x hexadecimal, 0 octal, else decimal; a
    /// minus sign wraps around, as with strtoul(3).
    pub(super) fn number(&self, option: &str) -> Result<Option<u64>, String> {
        let Some(text) = self.text(option) else {
            return Ok(None);
        };
        parse_number(text)
            .map(Some)
            .ok_or_else(|| format!("--{option}={text}: not a number"))
    }
}

fn parse_number(text: &str) -> Option<u64> {
    let (minus, digits) = match text.strip_prefix('-') {
        Some(digits) => (true, digits),
        None => (false, text),
    };
    if digits.starts_with(['+', '-']) {
        return None;
    }
    let lower = digits.to_ascii_lowercase();
    let n = if let Some(hex) = lower.strip_prefix("0x") {
        if hex.starts_with('+') {
            return None;
        }
        u64::from_str_radix(hex, 16)
    } else if lower.len() > 1 && lower.starts_with('0') {
        u64::from_str_radix(&lower, 8)
    } else {
        lower.parse()
    };
    let n = n.ok()?;
    Some(if minus { n.wrapping_neg() } else { n })
}

/// `bus/slot/function`, decimal.
pub(super) fn bus_slot_func(text: &str) -> Option<(i32, i32, i32)> {
    let mut parts = text.split('/').map(|p| p.parse::<u8>().ok().map(i32::from));
    match (parts.next()??, parts.next()??, parts.next()??, parts.next()) {
        (bus, slot, func, None) => Some((bus, slot, func)),
        _ => None,
    }
}

pub(super) fn parse(args: &[String]) -> Result<Given, String> {
    let options = all();
    let mut given = Given::default();
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        let Some(body) = arg.strip_prefix("--").filter(|b| !b.is_empty()) else {
            return Err(format!(
                "\"{arg}\": every argument is an option that starts with --"
            ));
        };
        let (word, value) = match body.split_once('=') {
            Some((word, value)) => (word, Some(value.to_owned())),
            None => (body, None),
        };
        let (name, takes) = find(&options, word)?;
        let value = match (takes, value) {
            (false, Some(_)) => return Err(format!("--{name} takes no value")),
            (true, None) => {
                let next = args
                    .next()
                    .ok_or_else(|| format!("--{name} wants a value"))?;
                Some(next.clone())
            }
            (_, value) => value,
        };
        given.0.insert(name.to_owned(), value);
    }
    Ok(given)
}

/// The option that a word means, and whether it takes a value.
fn find<'a>(
    options: &'a [(String, Option<String>)],
    word: &str,
) -> Result<(&'a str, bool), String> {
    if let Some((name, arg)) = options.iter().find(|(name, _)| name == word) {
        return Ok((name, arg.is_some()));
    }
    let matches: Vec<_> = options
        .iter()
        .filter(|(name, _)| name.starts_with(word))
        .collect();
    match matches.as_slice() {
        [(name, arg)] => Ok((name, arg.is_some())),
        [] => Err(format!("--{word}: no such option")),
        several => {
            let names: Vec<String> = several.iter().map(|(n, _)| format!("--{n}")).collect();
            Err(format!("--{word} could be any of {}", names.join(", ")))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse_words(words: &[&str]) -> Result<Given, String> {
        parse(&words.iter().map(|w| (*w).to_owned()).collect::<Vec<_>>())
    }

    #[test]
    fn values_come_after_an_equals_sign_or_as_the_next_word() {
        let given = parse_words(&[
            "--vm",
            "web",
            "--set-rip=0xfff0",
            "--get-stats",
            "--cpu",
            "2",
        ])
        .unwrap();
        assert_eq!(given.text("vm"), Some("web"));
        assert_eq!(given.number("set-rip"), Ok(Some(0xfff0)));
        assert_eq!(given.number("cpu"), Ok(Some(2)));
        assert!(given.has("get-stats") && !given.has("get-all"));
    }

    #[test]
    fn words_may_be_cut_short_while_they_stay_unambiguous() {
        let given = parse_words(&["--vm=a", "--destr", "--force-p"]).unwrap();
        assert!(given.has("destroy") && given.has("force-poweroff"));
        assert!(
            parse_words(&["--get-c"])
                .unwrap_err()
                .contains("could be any of")
        );
        // Exact wins over longer words that start alike.
        assert!(parse_words(&["--get-cr0"]).unwrap().has("get-cr0"));
    }

    #[test]
    fn mistakes_are_refused() {
        for words in [
            &["vm"][..],
            &["--"],
            &["-v"],
            &["--create=yes"],
            &["--vm"],
            &["--no-such-thing"],
        ] {
            assert!(parse_words(words).is_err(), "{words:?}");
        }
        assert!(parse_words(&["--cpu=one"]).unwrap().number("cpu").is_err());
    }

    #[test]
    fn numbers_are_those_of_strtoul() {
        for (text, n) in [
            ("0", 0),
            ("10", 10),
            ("010", 8),
            ("0x10", 16),
            ("0XfF", 255),
            ("-1", u64::MAX),
            ("0xffffffffffffffff", u64::MAX),
        ] {
            assert_eq!(parse_number(text), Some(n), "{text}");
        }
        for text in [
            "",
            "x",
            "0x",
            "08",
            "1 ",
            "--1",
            "+1",
            "0x+1",
            "18446744073709551616",
        ] {
            assert_eq!(parse_number(text), None, "{text}");
        }
    }

    #[test]
    fn a_pci_function_has_three_parts() {
        assert_eq!(bus_slot_func("3/31/7"), Some((3, 31, 7)));
        for bad in ["3/0", "3/0/0/0", "a/0/0", "3:0:0", "300/0/0", ""] {
            assert_eq!(bus_slot_func(bad), None, "{bad}");
        }
    }
}
