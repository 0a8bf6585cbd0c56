//! The countdown, the menu and the prompt.

use crate::script::{Script, elf, folder, load, text};
use bhyveload::freebsd::FreeBsd;
use bhyveload::loader::Outcome;
use std::time::Duration;

fn guest() -> tempfile::TempDir {
    folder(&[
        ("boot/kernel/kernel", &elf(2, 1)),
        ("boot/other/kernel", &elf(2, 2)),
        ("boot/kernel/m.ko", &elf(1, 3)),
        ("boot/loader.conf", b"m_load=YES\n"),
        ("boot/long", "line\n".repeat(60).as_bytes()),
        (
            "boot/words",
            b"echo one\n# no\n-nonsense\nset w=2\n@echo $w\n",
        ),
    ])
}

fn run(script: &mut Script, more: &[&str]) -> Outcome {
    let top = guest();
    let line = [&["-h", text(top.path())], more].concat();
    match load(&line, script) {
        Ok(outcome) => outcome,
        Err(error) => panic!("{error}\n{}", script.said),
    }
}

fn booted(script: &mut Script, more: &[&str]) -> FreeBsd {
    match run(script, more) {
        Outcome::Boot(boot) => *boot,
        Outcome::Leave(status) => panic!("left with {status}\n{}", script.said),
    }
}

#[test]
fn the_countdown_boots_when_nobody_does_anything() {
    let mut script = Script::terminal("", true);
    let boot = booted(
        &mut script,
        &["-e", "autoboot_delay=1", "-e", "beastie_disable=YES"],
    );
    assert_eq!(boot.modules.len(), 1);
    assert!(script.waits[0].unwrap() > Duration::from_millis(900));
    // Where there is no more input, nobody is waited for.
    let mut script = Script::new("");
    booted(&mut script, &["-e", "autoboot_delay=1000"]);
    assert_eq!(script.waits.len(), 1);
    // -1: not even looked at.
    let mut script = Script::terminal("xxx", false);
    booted(&mut script, &["-e", "autoboot_delay=-1"]);
    assert_eq!(script.waits.len(), 0);
    // Ten seconds unless somebody says otherwise.
    let mut script = Script::terminal("\r", false);
    booted(&mut script, &[]);
    assert!(script.waits[0].unwrap() > Duration::from_secs(9));
    assert!(script.waits[0].unwrap() <= Duration::from_secs(10));
}

#[test]
fn a_key_leads_to_the_prompt_and_no_to_it_at_once() {
    for (keys, delay) in [("xquit\r", "5"), ("quit\r", "NO")] {
        let mut script = Script::terminal(keys, false);
        let more = [
            "-e",
            "beastie_disable=YES",
            "-e",
            &format!("autoboot_delay={delay}"),
        ];
        assert_eq!(run(&mut script, &more), Outcome::Leave(1));
        assert!(script.said.contains("OK quit"), "{}", script.said);
    }
    let mut script = Script::new("reboot\n");
    assert_eq!(
        run(&mut script, &["-e", "autoboot_delay=NO"]),
        Outcome::Leave(2)
    );
}

#[test]
fn the_menu_has_freebsds_keys() {
    let howto = |keys: &str| {
        booted(&mut Script::terminal(keys, false), &[])
            .environment
            .howto()
    };
    assert_eq!(howto("\r"), 0);
    assert_eq!(howto("1"), 0);
    assert_eq!(howto("2"), 2);
    assert_eq!(howto("5\r"), 0x800);
    assert_eq!(howto("vs\r"), 0x802);
    assert_eq!(howto("vv\r"), 0);
    assert_eq!(howto("z1"), 0);
    assert_eq!(
        run(&mut Script::terminal("4", false), &[]),
        Outcome::Leave(2)
    );
    let mut script = Script::terminal("3boot -s\r", false);
    assert_eq!(booted(&mut script, &[]).environment.howto(), 2);
}

/// Obeys lines at the prompt and says what was said.
fn prompt(lines: &str) -> String {
    let mut script = Script::new(&format!("{lines}\nquit\n"));
    assert_eq!(
        run(&mut script, &["-e", "autoboot_delay=NO"]),
        Outcome::Leave(1)
    );
    script.said
}

#[test]
fn commands_do_what_help_says() {
    let said = prompt("help\n?\nhelp ls");
    for command in [
        "help", "ls", "more", "set", "unset", "show", "load", "unload", "lsmod", "boot", "reboot",
        "echo", "include", "autoboot", "lsdev",
    ] {
        let line = |start: &str| said.contains(&format!("{start}{command} "));
        assert!(line("\n") || line("OK "), "{command}: {said}");
    }
    let said = prompt("set a=\"x y\"\nshow a\necho <$a>\nunset a\nshow a");
    assert!(
        said.contains("OK x y\n") && said.contains("<x y>"),
        "{said}"
    );
    assert!(said.contains("is not set"), "{said}");
    let said = prompt("ls\nls /boot\nls -l boot/kernel\nls /nothing\nls /boot/long");
    for wanted in [
        " d boot\n",
        " d kernel\n",
        "65 kernel\n",
        "is not there",
        "is no folder",
    ] {
        assert!(said.contains(wanted), "{wanted}: {said}");
    }
    let said =
        prompt("load kernel\nload m\nload -t blob /boot/long x\nlsmod\nunload\nlsmod\necho end");
    let (before, after) = said
        .split_once("OK /boot/kernel/kernel (elf kernel")
        .unwrap();
    assert!(before.contains("/boot/kernel/m.ko"), "{said}");
    assert!(
        after.contains("(blob, 300 bytes) x") && after.ends_with("OK OK OK end\nOK "),
        "{said}"
    );
    let said = prompt("include /boot/words\necho $w");
    assert!(said.contains("OK one\n2\nOK 2\n"), "{said}");
    let said = prompt(
        "foo\nload nothing\nload -t\nset =\nmore /x\ninclude /x\nset currdev=disk7:\necho still here",
    );
    assert!(said.contains("foo: command: is not known"), "{said}");
    assert!(
        said.contains("disk7") && said.contains("still here"),
        "{said}"
    );
    let said = prompt("lsdev\npwd\nmore host0:/boot/loader.conf\nls host9:/");
    assert!(
        said.contains("* host0: host folder") && said.contains("host0:/\n"),
        "{said}"
    );
    assert!(
        said.contains("m_load=YES") && said.contains("there is no host9"),
        "{said}"
    );
}

#[test]
fn boot_takes_a_kernel_and_flags_and_what_is_loaded_already() {
    let ok = ["-e", "autoboot_delay=NO"];
    let boot = booted(&mut Script::new("boot -sv\n"), &ok);
    assert_eq!(boot.environment.howto(), 0x802);
    assert_eq!(boot.kernel_args.as_deref(), Some("-sv"));
    let boot = booted(&mut Script::new("boot other\n"), &ok);
    assert_eq!(boot.kernel_name, "/boot/other/kernel");
    // By hand: exactly what was loaded.
    let boot = booted(
        &mut Script::new("load /boot/other/kernel\nset x=1\nboot\n"),
        &ok,
    );
    assert_eq!(
        (boot.kernel_name.as_str(), boot.modules.len()),
        ("/boot/other/kernel", 0)
    );
    assert_eq!(boot.environment.get("x"), Some("1"));
    let boot = booted(&mut Script::new("disable-module m\nautoboot 0\n"), &ok);
    assert_eq!(boot.modules.len(), 0);
    // A kernel that is not there leads back to the prompt.
    let boot = booted(
        &mut Script::new("set kernel=none\nboot\nset kernel=kernel\nboot\n"),
        &ok,
    );
    assert_eq!(boot.kernel_name, "/boot/kernel/kernel");
}

#[test]
fn lines_are_edited_and_remembered() {
    let mut script = Script::terminal(
        "ecto\x7f\x7fho ab\r\x1b[A\x17cd\rnonsense\x15echo ef\rjunk\x03\x1b[A\x1b[A\x1b[Bgh\r\x04",
        false,
    );
    assert_eq!(
        run(&mut script, &["-e", "autoboot_delay=NO"]),
        Outcome::Leave(1)
    );
    let said = &script.said;
    for wanted in [
        "echo ab\nab\n",
        "echo cd\ncd\n",
        "echo ef\nef\n",
        "echo efgh\nefgh\n",
    ] {
        assert!(said.contains(wanted), "{wanted:?} in {said}");
    }
}

#[test]
fn long_text_comes_in_pages_to_who_reads_it() {
    let mut script = Script::terminal("more /boot/long\r \rqecho done\rquit\r", false);
    assert_eq!(
        run(&mut script, &["-e", "autoboot_delay=NO"]),
        Outcome::Leave(1)
    );
    assert_eq!(script.said.matches("line\n").count(), 23 + 23 + 1);
    assert!(script.said.contains("done\n"), "{}", script.said);
}

#[test]
fn input_that_ends_at_the_prompt_is_an_error() {
    let top = guest();
    let mut script = Script::new("echo hi");
    let line = ["-h", text(top.path()), "-e", "autoboot_delay=NO"];
    let error = load(&line, &mut script).unwrap_err();
    assert!(error.to_string().contains("prompt"), "{error}");
    assert!(script.said.contains("hi\n"));
}
