//! virtio-9p: a shared folder (virtio's 9P transport, device type 9; the
//! protocol is 9P2000.L, as Linux and FreeBSD speak it).
//!
//! [`request`] is what the guest asks, [`reply`] how it is answered,
//! [`backend`] the folder, [`device`] the session between them.

pub mod backend;
pub mod device;
pub mod reply;
pub mod request;

use std::path::PathBuf;

use super::Built;

/// A share, as `-s N,virtio-9p,NAME=PATH[,ro]` asks for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// The mount tag.
    pub tag: String,
    /// The folder.
    pub path: PathBuf,
    /// Nothing can be changed.
    pub read_only: bool,
}

impl std::str::FromStr for Options {
    type Err = String;

    fn from_str(text: &str) -> Result<Options, String> {
        let mut share = None;
        let mut read_only = false;
        for part in text.split(',') {
            match part.split_once('=') {
                None if part == "ro" => read_only = true,
                Some((tag, path)) if share.is_none() && !tag.is_empty() && !path.is_empty() => {
                    if tag.len() > device::MAX_TAG {
                        return Err(format!(
                            "{part}: a share's name has at most {} bytes",
                            device::MAX_TAG
                        ));
                    }
                    share = Some((tag.to_owned(), PathBuf::from(path)));
                }
                Some(_) if share.is_some() => {
                    return Err(format!("{part}: one share a device; use another slot"));
                }
                _ => {
                    return Err(format!(
                        "\"{part}\": a share is NAME=PATH, and behind it there is ro"
                    ));
                }
            }
        }
        let (tag, path) = share.ok_or("which folder? A share is NAME=PATH")?;
        Ok(Options {
            tag,
            path,
            read_only,
        })
    }
}

/// A share, as the options ask for it.
///
/// # Errors
/// What is wrong with the options or the folder.
pub fn build(conf: &str) -> Result<Built, String> {
    let options: Options = conf.parse()?;
    let (identity, device) = device::P9::open(&options)
        .map_err(|e| format!("{}: {}", options.path.display(), e.desc()))?;
    Ok(Built::single(identity, device))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_is_a_name_and_a_folder() {
        let o: Options = "home=/usr/home/a=b,ro".parse().unwrap();
        assert_eq!((o.tag.as_str(), o.read_only), ("home", true));
        assert_eq!(o.path, PathBuf::from("/usr/home/a=b"));
        for bad in ["", "ro", "=x", "a=", "a=/b,c=/d", "a=/b,rw", "/b"] {
            assert!(bad.parse::<Options>().is_err(), "{bad}");
        }
        assert!(
            format!("{}=/b", "x".repeat(300))
                .parse::<Options>()
                .is_err()
        );
    }
}
