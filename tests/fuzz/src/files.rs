//! What people hand to bhyve and bhyveload: command lines, configuration,
//! kernels, modules.

use bhyve_config::variables::Variables;
use bhyve_config::{Program, Settings};
use bhyveload::env::Environment;
use bhyveload::freebsd::{FreeBsd, Module};
use bhyveload::input::Input;
use bhyveload::target::MemoryTarget;
use bhyveload::{conf, freebsd, linux, multiboot};

const MEMORY: usize = 4 << 20;
/// A kernel that loads, so that the module's turn comes.
const KERNEL: &[u8] = include_bytes!("../corpus/elf_kernel/plain");

fn input(name: &str, data: &[u8]) -> Input {
    Input {
        name: name.into(),
        data: data.into(),
    }
}

fn boot(kernel: &[u8], modules: Vec<Module>) {
    let boot = FreeBsd {
        kernel: input("kernel", kernel),
        kernel_name: "/boot/kernel/kernel".into(),
        kernel_args: None,
        modules,
        environment: Environment::default(),
    };
    if let Ok(loaded) = freebsd::load(&mut MemoryTarget::new(MEMORY), &boot) {
        assert!(loaded.kernend <= MEMORY as u64);
    }
}

/// A FreeBSD kernel.
pub fn elf_kernel(data: &[u8]) {
    boot(data, Vec::new());
}

/// A kernel module beside a good kernel.
pub fn elf_module(data: &[u8]) {
    let module = Module {
        input: input("m.ko", data),
        name: "/boot/kernel/m.ko".into(),
        kind: None,
        args: None,
    };
    boot(KERNEL, vec![module]);
}

/// A Linux kernel.
pub fn bzimage(data: &[u8]) {
    let boot = linux::Linux {
        kernel: input("bzImage", data),
        initrd: Some(input("initrd", &[1; 100])),
        command_line: "console=ttyS0".into(),
    };
    let _ = linux::load(&mut MemoryTarget::new(MEMORY), &boot);
}

/// A multiboot kernel.
pub fn multiboot(data: &[u8]) {
    let boot = multiboot::Multiboot {
        kernel: input("kernel", data),
        modules: vec![(input("m", &[2; 10]), "m".into())],
        command_line: "x".into(),
    };
    let _ = multiboot::load(&mut MemoryTarget::new(MEMORY), &boot);
}

/// `loader.conf`.
pub fn loader_conf(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let lines = text.lines().count();
    let parsed = conf::parse(&text);
    assert!(parsed.settings.len() + parsed.bad.len() <= lines);
    for (_, value) in &parsed.settings {
        let _ = conf::expand(value, |name| (name == "a").then_some(value.as_str()));
    }
}

/// What is printed says the same as what was read.
fn printed(settings: &Settings) {
    let words = |s: &Settings| -> Vec<String> {
        let programs = [Program::Bhyve, Program::Bhyveload];
        let all = programs.into_iter().flat_map(|p| s.arguments(p));
        all.flat_map(|a| a.words().collect::<Vec<_>>()).collect()
    };
    let text = bhyve_config::print::toml(settings);
    let again = bhyve_config::file::parse("printed", &text)
        .unwrap_or_else(|e| panic!("{e} in what was printed:\n{text}"));
    assert_eq!(words(&again), words(settings), "{text}");
}

/// A VM's file.
pub fn config_toml(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    match bhyve_config::file::parse("vm.toml", &text) {
        Ok(settings) => printed(&settings),
        Err(e) => assert!(e.to_string().starts_with("vm.toml:"), "{e}"),
    }
}

/// A file of bhyve_config(5).
pub fn config_variables(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let mut variables = Variables::default();
    if variables.parse("vm.conf", &text).is_ok()
        && let Ok((settings, _)) = variables.settings()
    {
        printed(&settings);
    }
}

/// bhyve's command line, an argument a line.
pub fn bhyve_cli(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let _ = bhyve::cli::parse(text.lines().map(str::to_owned));
}
