//! Manual pages in mdoc(7). `packaging/man/NAME.SECTION` is the page with lines of
//! ours: `@synopsis NAME` and `@options NAME` stand for what the program's help
//! says, and `@ -c` begins text that goes under option `-c` in the latter, up to
//! the next line that begins with `@`; `@end` ends the last. `@devices` stands
//! for the emulations of `-s`, `@keys` and `@device-keys` for those of a VM's file.

use std::fmt::Write;

use bhyve::pci::catalog::EMULATIONS;
use bhyve_config::keys::{DEVICE_KEYS, KEYS, Kind, Opt as Words};

use crate::program::{self, Opt, Program};

/// The pages: file name and source.
const SOURCES: [(&str, &str); 5] = [
    ("bhyve.8", include_str!("../../man/bhyve.8")),
    ("bhyvectl.8", include_str!("../../man/bhyvectl.8")),
    ("bhyveload.8", include_str!("../../man/bhyveload.8")),
    ("bhyve.toml.5", include_str!("../../man/bhyve.toml.5")),
    ("vmm.4", include_str!("../../man/vmm.4")),
];

/// A source that does not fit the program.
#[derive(Debug, thiserror::Error)]
#[error("packaging/man/{0}: {1}")]
pub struct BadSource(String, String);

/// All pages, file name and text.
///
/// # Errors
/// A source names a program or an option that is not there.
pub fn pages() -> Result<Vec<(String, String)>, crate::Error> {
    let programs = program::all()?;
    SOURCES
        .iter()
        .map(|(name, source)| {
            let text = expand(name, source, &programs)?;
            Ok(((*name).to_owned(), text))
        })
        .collect()
}

fn expand(file: &str, source: &str, programs: &[Program]) -> Result<String, BadSource> {
    let bad = |why: String| BadSource(file.into(), why);
    let find = |name: &str| {
        let found = programs.iter().find(|p| p.name == name);
        found.ok_or_else(|| bad(format!("no program \"{name}\"")))
    };
    let mut out = String::new();
    let mut lines = source.lines().peekable();
    while let Some(line) = lines.next() {
        if let Some(name) = line.strip_prefix("@synopsis ") {
            synopsis(&mut out, find(name)?);
        } else if let Some(name) = line.strip_prefix("@options ") {
            let program = find(name)?;
            let mut extra: Vec<(String, String)> = Vec::new();
            for line in lines.by_ref() {
                if line == "@end" {
                    break;
                }
                if let Some(option) = line.strip_prefix("@ ") {
                    if !program
                        .options
                        .iter()
                        .any(|o| o.names().iter().any(|n| n == option))
                    {
                        return Err(bad(format!("{name} has no option {option}")));
                    }
                    extra.push((option.into(), String::new()));
                } else if let Some((_, text)) = extra.last_mut() {
                    text.push_str(line);
                    text.push('\n');
                } else {
                    return Err(bad(format!("\"{line}\" belongs to no option")));
                }
            }
            options(&mut out, program, &extra);
        } else if line == "@devices" {
            for emulation in EMULATIONS {
                devices(&mut out, emulation.name, emulation.help);
            }
        } else if line == "@keys" {
            keys(&mut out);
        } else if line == "@device-keys" {
            let _ = writeln!(out, ".Bl -tag -width indent");
            for (name, doc) in DEVICE_KEYS {
                let _ = writeln!(out, ".It Li {name}\n{}", prose(doc));
            }
            let _ = writeln!(out, ".El");
        } else if line.starts_with('@') {
            return Err(bad(format!("what is \"{line}\"?")));
        } else {
            out.push_str(line);
            out.push('\n');
        }
    }
    Ok(out)
}

/// Text as mdoc takes it: nothing of it a macro or an escape, a sentence a line,
/// no line longer than 78 columns.
fn prose(text: &str) -> String {
    let mut out = String::new();
    let mut column = 0;
    for word in text.split_whitespace() {
        // mdoc(7) has a macro for it, and mandoc insists.
        if let Some(rest) = word.strip_prefix("FreeBSD") {
            let end = if column > 0 { "\n" } else { "" };
            let ns = if rest.starts_with('\'') { " Ns " } else { " " };
            let _ = writeln!(out, "{end}{}", format!(".Fx{ns}{rest}").trim_end());
            column = 0;
            continue;
        }
        let word = word.replace('\\', "\\e");
        let width = word.chars().count();
        if column > 0 && (column + 1 + width > 78 || out.ends_with(['.', '?', '!'])) {
            out.push('\n');
            column = 0;
        }
        if column > 0 {
            out.push(' ');
            column += 1;
        } else if word.starts_with(['.', '\'']) {
            out.push_str("\\&");
        }
        out.push_str(&word);
        column += width;
    }
    out.trim_end().to_owned()
}

/// The help's words as a sentence.
fn sentence(help: &str) -> String {
    let help = help.trim();
    // An ellipsis is one.
    let end = if help.ends_with('.') { "" } else { "." };
    let mut chars = help.chars();
    match chars.next() {
        Some(first) => format!("{}{}{end}", first.to_uppercase(), chars.as_str()),
        None => String::new(),
    }
}

/// An argument for a macro line.
fn argument(text: &str) -> String {
    let text = text.replace('\\', "\\e");
    // Words that mdoc(7) would take for macros, and blanks, want quotes.
    if text.contains(' ') || text.len() <= 3 {
        format!("\"{}\"", text.replace('"', "\\(dq"))
    } else {
        text
    }
}

/// `.Fl c Ar conf`, behind the macro's dot.
fn flags(option: &Opt) -> String {
    let mut text = String::new();
    for (i, name) in option.names().iter().enumerate() {
        let comma = if i > 0 { " , " } else { "" };
        let _ = write!(text, "{comma}Fl {}", name.strip_prefix('-').unwrap_or(name));
        if let Some(a) = &option.argument {
            let join = if name.starts_with("--") {
                " Ns = Ns"
            } else {
                ""
            };
            let _ = write!(text, "{join} Ar {}", argument(a));
        }
    }
    text
}

fn synopsis(out: &mut String, program: &Program) {
    let _ = writeln!(out, ".Nm");
    let short: String = program
        .options
        .iter()
        .filter(|o| o.argument.is_none())
        .filter_map(|o| o.short)
        .collect();
    if !short.is_empty() {
        let _ = writeln!(out, ".Op Fl {short}");
    }
    for option in program
        .options
        .iter()
        .filter(|o| o.argument.is_some() || o.short.is_none())
    {
        let _ = writeln!(out, ".Op {}", flags(option));
    }
    if let Some(operand) = program.operand {
        let _ = writeln!(out, ".Ar {operand}");
    }
}

fn options(out: &mut String, program: &Program, extra: &[(String, String)]) {
    let _ = writeln!(out, ".Bl -tag -width indent");
    for option in &program.options {
        let _ = writeln!(out, ".It {}", flags(option));
        if !option.help.is_empty() {
            let _ = writeln!(out, "{}", prose(&sentence(&option.help)));
        }
        for (_, text) in extra
            .iter()
            .filter(|(name, _)| option.names().contains(name))
        {
            out.push_str(text);
        }
    }
    let _ = writeln!(out, ".El");
}

/// `OPTIONS: what it is`, or only what it is.
fn devices(out: &mut String, name: &str, help: &str) {
    let (conf, what) = match help.split_once(": ") {
        Some((conf, what)) if !conf.contains(' ') => (Some(conf), what),
        _ => (None, help),
    };
    let _ = write!(out, ".It Cm {name}");
    if let Some(conf) = conf {
        let (ns, conf) = match conf.strip_prefix(',') {
            Some(_) => ("Ns", conf.to_owned()),
            None => ("Ns", format!(",{conf}")),
        };
        // A line can end before an option.
        let conf = argument(&conf).replace("[,", "\\:[,");
        let _ = write!(out, " {ns} Ar {conf}");
    }
    let _ = writeln!(out, "\n{}", prose(&sentence(what)));
}

/// The keys of bhyve.toml(5), a list.
fn keys(out: &mut String) {
    let _ = writeln!(out, ".Bl -tag -width indent");
    for key in KEYS {
        let kind = match key.kind {
            Kind::Text => "string",
            Kind::Number => "number or string",
            Kind::Bool => "true or false",
            Kind::List => "string or array of strings",
            Kind::Table => "table of strings",
        };
        let options: Vec<String> = [("", key.bhyve), ("bhyveload ", key.bhyveload)]
            .iter()
            .filter_map(|(program, words)| Some(format!("{program}{}", on_the_line(words)?)))
            .collect();
        let options = match options.as_slice() {
            [] => String::new(),
            some => format!("({})\n", some.join(", ")),
        };
        let _ = writeln!(out, ".It Li {}\n.Em {kind}\n{options}.br", key.path);
        let _ = writeln!(out, "{}", prose(key.doc));
        if !key.default.is_empty() {
            let _ = writeln!(out, "{}", prose(&format!("The default: {}.", key.default)));
        }
    }
    let _ = writeln!(out, ".El");
}

/// How a key is said on the command line.
fn on_the_line(words: &Words) -> Option<String> {
    match words {
        Words::None => None,
        Words::Operand => Some("vmname".into()),
        Words::Value(option) | Words::Pairs(option) => Some((*option).into()),
        Words::Prefixed(option, prefix) => {
            Some(format!("{option} {}", prefix.trim_end_matches(',')))
        }
        Words::Flag(on, off) => {
            let both: Vec<&str> = [*on, *off].into_iter().filter(|o| !o.is_empty()).collect();
            Some(both.join(" "))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_no_macro_and_no_escape() {
        assert_eq!(prose(".Sh is\\n text. Next"), "\\&.Sh is\\en text.\nNext");
        assert_eq!(sentence("create ACPI tables"), "Create ACPI tables.");
        let long = "word ".repeat(40);
        assert!(prose(&long).lines().all(|l| l.len() <= 78));
    }

    #[test]
    fn freebsd_has_a_macro() {
        assert_eq!(prose("A FreeBSD's kernel"), "A\n.Fx Ns 's\nkernel");
        assert_eq!(prose("for FreeBSD."), "for\n.Fx .");
    }

    #[test]
    fn a_source_that_names_what_is_not_there_is_refused() {
        let programs = [Program {
            name: "p",
            operand: None,
            options: vec![Opt {
                short: Some('a'),
                help: "first".into(),
                ..Opt::default()
            }],
            help: String::new(),
        }];
        let good = expand("p.8", "@options p\n@ -a\nMore.\n@end\n", &programs).unwrap();
        assert!(good.contains(".It Fl a\nFirst.\nMore.\n.El"), "{good}");
        for bad in [
            "@options q\n@end\n",
            "@options p\n@ -b\n@end\n",
            "@what\n",
            "@options p\nx\n@end\n",
        ] {
            assert!(expand("p.8", bad, &programs).is_err(), "{bad}");
        }
    }
}
