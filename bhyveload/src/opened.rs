//! Files that are opened before this program gives up opening any.

use bhyve_sandbox::Purpose;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

static KEPT: Mutex<Vec<(PathBuf, File)>> = Mutex::new(Vec::new());

/// Opens a file or folder for the [`open`] that comes later, once. What cannot be
/// opened is that one's to tell.
pub fn keep(path: &Path) {
    let Ok(file) = File::open(path) else {
        return;
    };
    let purpose = match file.metadata() {
        Ok(m) if m.is_dir() => Purpose::Folder,
        _ => Purpose::Image,
    };
    if bhyve_sandbox::limit(&file, purpose).is_ok() {
        let mut kept = KEPT.lock().unwrap_or_else(PoisonError::into_inner);
        kept.push((path.to_owned(), file));
    }
}

/// A file that was kept, or else opened now.
///
/// # Errors
/// The host says no.
pub fn open(path: &Path) -> io::Result<File> {
    let mut kept = KEPT.lock().unwrap_or_else(PoisonError::into_inner);
    match kept.iter().position(|(p, _)| p == path) {
        Some(at) => Ok(kept.swap_remove(at).1),
        None => File::open(path),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn what_was_kept_is_there_when_its_name_leads_elsewhere() {
        let top = tempfile::tempdir().unwrap();
        let path = top.path().join("kernel");
        std::fs::write(&path, b"first").unwrap();
        keep(&path);
        std::fs::rename(&path, top.path().join("other")).unwrap();
        let read = || {
            let mut text = String::new();
            open(&path)?.read_to_string(&mut text).map(|_| text)
        };
        assert_eq!(read().unwrap(), "first");
        // Once: the next is opened by its name.
        assert_eq!(read().unwrap_err().kind(), io::ErrorKind::NotFound);
        keep(&top.path().join("nothing"));
    }
}
