//! Completions for bash, zsh, fish and tcsh. Unlike a generator for any program,
//! these know which VMs there are and what `-s` and `-l` may begin with.

use std::fmt::Write;

use bhyve::pci::catalog::EMULATIONS;

use crate::program::{Opt, Program};

/// A shell.
pub struct Shell {
    /// Its name.
    pub name: &'static str,
    /// The name of the file for a program.
    pub file: fn(&str) -> String,
    /// The file's text.
    pub text: fn(&Program) -> String,
}

/// Those that can complete. sh(1) cannot.
pub const SHELLS: [Shell; 4] = [
    Shell {
        name: "bash",
        file: |p| p.into(),
        text: bash,
    },
    Shell {
        name: "zsh",
        file: |p| format!("_{p}"),
        text: zsh,
    },
    Shell {
        name: "fish",
        file: |p| format!("{p}.fish"),
        text: fish,
    },
    Shell {
        name: "tcsh",
        file: |p| format!("{p}.csh"),
        text: tcsh,
    },
];

/// What can stand for an argument.
enum Values {
    /// Nothing that could be listed.
    Any,
    /// Files and folders.
    Files,
    /// VMs.
    Vms,
    /// One of these.
    Words(Vec<String>),
}

fn values(program: &Program, option: &Opt) -> Values {
    let argument = option.argument.as_deref().unwrap_or_default();
    let words = |list: &[&str]| Values::Words(list.iter().map(|w| (*w).to_owned()).collect());
    match (program.name, option.name().as_str()) {
        ("bhyve", "-s") => {
            let mut list = vec!["help".to_owned()];
            list.extend(EMULATIONS.iter().map(|e| match e.name {
                name @ ("hostbridge" | "amd_hostbridge") => format!("0,{name}"),
                name @ "lpc" => format!("31,{name}"),
                name => format!("4,{name}"),
            }));
            Values::Words(list)
        }
        ("bhyve", "-l") => words(&[
            "help",
            "com1,stdio",
            "com1,/dev/nmdm0A",
            "com2,",
            "pc-testdev",
        ]),
        ("bhyvectl", "--vm") => Values::Vms,
        ("bhyvectl", "--capname") => words(&capabilities()),
        ("bhyvectl", "--setcap") => words(&["0", "1"]),
        _ if ["file", "image", "dir", "loader", "console"]
            .iter()
            .any(|kind| argument.to_ascii_lowercase().contains(kind)) =>
        {
            Values::Files
        }
        _ => Values::Any,
    }
}

fn capabilities() -> Vec<&'static str> {
    vmmapi::Capability::ALL.iter().map(|c| c.name()).collect()
}

const HEADER: &str = "generated from the program's help by `cargo xtask completions`";

fn bash(program: &Program) -> String {
    let name = program.name;
    let all: Vec<String> = program.options.iter().flat_map(Opt::names).collect();
    let mut cases = String::new();
    for option in program.options.iter().filter(|o| o.argument.is_some()) {
        let action = match values(program, option) {
            Values::Any => ":".into(),
            Values::Files => "compopt -o filenames; COMPREPLY=($(compgen -f -- \"$cur\"))".into(),
            Values::Vms => "COMPREPLY=($(compgen -W \"$vms\" -- \"$cur\"))".into(),
            Values::Words(words) => {
                format!(
                    "COMPREPLY=($(compgen -W '{}' -- \"$cur\"))",
                    words.join(" ")
                )
            }
        };
        let names = option.names().join("|");
        let _ = writeln!(cases, "\t{names}) {action}; return ;;");
    }
    let operand = match program.operand {
        Some(_) => "\telse\n\t\tCOMPREPLY=($(compgen -W \"$vms\" -- \"$cur\"))\n",
        None => "",
    };
    format!(
        "# bash completion for {name}(8), {HEADER}
_{name}()
{{
	local cur=${{COMP_WORDS[COMP_CWORD]}} prev=${{COMP_WORDS[COMP_CWORD-1]}}
	local vms=$(command ls /dev/vmm 2>/dev/null)
	# bash takes the = of --option=value for a word of its own.
	if [[ $cur == = ]]; then
		cur=
	elif [[ $prev == = ]]; then
		prev=${{COMP_WORDS[COMP_CWORD-2]}}
	fi
	COMPREPLY=()
	case $prev in
{cases}	esac
	if [[ $cur == -* ]]; then
		COMPREPLY=($(compgen -W '{all}' -- \"$cur\"))
{operand}	fi
}}
complete -F _{name} {name}
",
        all = all.join(" ")
    )
}

fn zsh(program: &Program) -> String {
    let name = program.name;
    let escape = |text: &str| {
        let mut out = String::new();
        for c in text.chars() {
            match c {
                '\'' => out.push_str("'\\''"),
                '[' | ']' | ':' | '\\' => out.extend(['\\', c]),
                _ => out.push(c),
            }
        }
        out
    };
    let mut specs = String::new();
    for option in &program.options {
        let action = match values(program, option) {
            Values::Any => " ".into(),
            Values::Files => "_files".into(),
            Values::Vms => "_vmm_names".into(),
            Values::Words(words) => format!("({})", words.join(" ")),
        };
        for word in option.names() {
            let (join, argument) = match &option.argument {
                Some(a) => {
                    let join = if word.starts_with("--") { "=" } else { "+" };
                    (join, format!(":{}:{action}", escape(a)))
                }
                None => ("", String::new()),
            };
            let help = match option.help.as_str() {
                "" => word.trim_start_matches('-').replace('-', " "),
                help => escape(help),
            };
            let _ = writeln!(specs, "\t'*{word}{join}[{help}]{argument}' \\");
        }
    }
    let operand = program
        .operand
        .map_or_else(String::new, |o| format!("\t':{o}:_vmm_names' \\\n"));
    format!(
        "#compdef {name}
# zsh completion for {name}(8), {HEADER}
_vmm_names() {{
	local -a names
	names=(/dev/vmm/*(N:t))
	(( $#names )) && compadd -a names
}}
_arguments -s \\
{specs}{operand}	&& return 0
"
    )
}

fn fish(program: &Program) -> String {
    let name = program.name;
    let quote = |text: &str| format!("'{}'", text.replace('\\', "\\\\").replace('\'', "\\'"));
    let vms = "'(command ls /dev/vmm 2>/dev/null)'";
    let mut text = format!("# fish completion for {name}(8), {HEADER}\ncomplete -c {name} -f");
    if program.operand.is_some() {
        let _ = write!(text, " -a {vms}");
    }
    text.push('\n');
    for option in &program.options {
        let _ = write!(text, "complete -c {name}");
        if let Some(letter) = option.short {
            let _ = write!(text, " -s {letter}");
        }
        if let Some(word) = &option.long {
            let _ = write!(text, " -l {word}");
        }
        if option.argument.is_some() {
            text.push_str(match values(program, option) {
                Values::Files => " -r -F",
                _ => " -x",
            });
            match values(program, option) {
                Values::Vms => text.push_str(&format!(" -a {vms}")),
                Values::Words(words) => text.push_str(&format!(" -a {}", quote(&words.join(" ")))),
                Values::Any | Values::Files => {}
            }
        }
        if !option.help.is_empty() {
            let _ = write!(text, " -d {}", quote(&option.help));
        }
        text.push('\n');
    }
    text
}

fn tcsh(program: &Program) -> String {
    let name = program.name;
    let vms = "`ls /dev/vmm`";
    let of = |prefix: &str| -> Vec<String> {
        let words = program.options.iter().flat_map(Opt::names);
        words
            .filter_map(|w| w.strip_prefix(prefix).map(str::to_owned))
            .collect()
    };
    let long = of("--");
    let short: Vec<String> = of("-")
        .into_iter()
        .filter(|w| !w.starts_with('-'))
        .collect();
    let mut text = format!("# tcsh completion for {name}(8), {HEADER}\ncomplete {name}");
    for option in program.options.iter().filter(|o| o.argument.is_some()) {
        let list = match values(program, option) {
            Values::Any => "x:an argument:".to_owned(),
            Values::Files => "f".into(),
            Values::Vms => vms.into(),
            // Other separators than the usual slash: these words have slashes.
            Values::Words(words) => format!("({})", words.join(" ")),
        };
        for word in option.names() {
            if word.starts_with("--") {
                let _ = write!(text, " \\\n\t'c%{word}=%{list}%'");
            }
            let _ = write!(text, " \\\n\t'n%{word}%{list}%'");
        }
    }
    if !long.is_empty() {
        let _ = write!(text, " \\\n\t'c%--%({})%'", long.join(" "));
    }
    if !short.is_empty() {
        let _ = write!(text, " \\\n\t'c%-%({})%'", short.join(" "));
    }
    if program.operand.is_some() {
        let _ = write!(text, " \\\n\t'p%*%{vms}%'");
    }
    text.push('\n');
    text
}
