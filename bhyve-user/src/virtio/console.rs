//! virtio-console: ports that are Unix sockets in the host (virtio 1.2 §5.3).
//!
//! [`request`] is what the guest says on the control queue, [`backend`] a
//! port's socket, [`device`] the rest.

pub mod backend;
pub mod device;
pub mod request;

use std::path::PathBuf;

use super::Built;

/// Most ports: each takes two queues, and the first four are taken in any case.
pub const MAX_PORTS: usize = 16;

/// A port, as `NAME=PATH`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortOptions {
    /// What the guest finds it by.
    pub name: String,
    /// Its socket.
    pub path: PathBuf,
}

/// Parses `NAME=PATH[,NAME=PATH]...`.
///
/// # Errors
/// What is wrong with it.
pub fn parse(conf: &str) -> Result<Vec<PortOptions>, String> {
    let mut ports: Vec<PortOptions> = Vec::new();
    for part in conf.split(',').filter(|p| !p.is_empty()) {
        let (name, path) = part
            .split_once('=')
            .filter(|(n, p)| !n.is_empty() && !p.is_empty())
            .ok_or_else(|| format!("\"{part}\": a port is NAME=PATH, PATH a socket"))?;
        if ports.iter().any(|p| p.name == name) {
            return Err(format!("{part}: there is a port \"{name}\" already"));
        }
        ports.push(PortOptions {
            name: name.into(),
            path: path.into(),
        });
    }
    match ports.len() {
        0 => Err("which ports? Each is NAME=PATH, PATH a socket".into()),
        1..=MAX_PORTS => Ok(ports),
        n => Err(format!("{n} ports; {MAX_PORTS} are possible")),
    }
}

/// A console, as the options ask for it.
///
/// # Errors
/// What is wrong with the options or a socket.
pub fn build(conf: &str) -> Result<Built, String> {
    let (identity, device) = device::Console::open(&parse(conf)?)?;
    Ok(Built::single(identity, device))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_have_a_name_and_a_socket_each() {
        let ports = parse("org.qemu.guest_agent.0=/run/a,b=/run/c=d").unwrap();
        assert_eq!(ports[0].name, "org.qemu.guest_agent.0");
        assert_eq!(ports[1].path, PathBuf::from("/run/c=d"));
        let many: Vec<String> = (0..17).map(|i| format!("p{i}=/p{i}")).collect();
        for bad in ["", "a", "a=", "=/a", "a=/a,a=/b", &many.join(",")] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
