//! Fuzz targets: one function for each thing that reads what a hostile guest
//! or a damaged file says. A target panics where the program under it would
//! have panicked, looped or left its bounds.
//!
//! `cargo xtask fuzz NAME --seconds N` runs one with libFuzzer; `cargo test`
//! replays every committed input, and cheap mutations of them.
#![forbid(unsafe_code)]

mod dbgport;
mod devices;
mod disks;
mod files;
mod kernel;
mod machine;
mod net;
mod virtio;

/// A target: its name, and what it does with an input.
#[derive(Clone, Copy)]
pub struct Target {
    /// The name on the command line and of the corpus's folder.
    pub name: &'static str,
    /// Runs one input.
    pub run: fn(&[u8]),
}

/// All targets, in order of name.
pub const TARGETS: &[Target] = &[
    Target {
        name: "ahci",
        run: devices::ahci,
    },
    Target {
        name: "bhyve_cli",
        run: files::bhyve_cli,
    },
    Target {
        name: "bzimage",
        run: files::bzimage,
    },
    Target {
        name: "chipset",
        run: kernel::chipset,
    },
    Target {
        name: "config_toml",
        run: files::config_toml,
    },
    Target {
        name: "config_variables",
        run: files::config_variables,
    },
    Target {
        name: "debug_port",
        run: dbgport::debug_port,
    },
    Target {
        name: "elf_kernel",
        run: files::elf_kernel,
    },
    Target {
        name: "elf_module",
        run: files::elf_module,
    },
    Target {
        name: "instruction",
        run: kernel::instruction,
    },
    Target {
        name: "iso9660",
        run: disks::iso9660,
    },
    Target {
        name: "linker_hints",
        run: disks::linker_hints,
    },
    Target {
        name: "loader",
        run: disks::loader,
    },
    Target {
        name: "loader_conf",
        run: files::loader_conf,
    },
    Target {
        name: "multiboot",
        run: files::multiboot,
    },
    Target {
        name: "partitions",
        run: disks::partitions,
    },
    Target {
        name: "nvme",
        run: devices::nvme,
    },
    Target {
        name: "passthru",
        run: devices::passthru,
    },
    Target {
        name: "pci_config",
        run: devices::pci_config,
    },
    Target {
        name: "uart",
        run: devices::uart,
    },
    Target {
        name: "ufs",
        run: disks::ufs,
    },
    Target {
        name: "user_net",
        run: net::user_net,
    },
    Target {
        name: "virtio_net",
        run: net::virtio_net,
    },
    Target {
        name: "virtio_9p",
        run: virtio::virtio_9p,
    },
    Target {
        name: "virtio_balloon",
        run: virtio::virtio_balloon,
    },
    Target {
        name: "virtio_blk",
        run: virtio::virtio_blk,
    },
    Target {
        name: "virtio_console",
        run: virtio::virtio_console,
    },
    Target {
        name: "virtio_vsock",
        run: virtio::virtio_vsock,
    },
];

/// The target called `name`.
pub fn target(name: &str) -> Option<Target> {
    TARGETS.iter().copied().find(|t| t.name == name)
}
