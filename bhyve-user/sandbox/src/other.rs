//! FreeBSD's capability mode; other hosts have nothing.

use crate::{Error, Needs, Report};

pub fn enter(needs: &Needs, _refused: Box<dyn Fn(&str) + Send>) -> Result<Report, Error> {
    let mut report = Report::default();
    // Addresses and paths are global names; capability mode knows none.
    if needs.network || needs.unix || needs.names() {
        report
            .lacking
            .push("no capability mode: sockets or files are still to be opened by name".into());
        return Ok(report);
    }
    #[cfg(target_os = "freebsd")]
    match vmmapi::confine::enter_capability_mode() {
        Ok(()) => {}
        Err(e) => report.lacking.push(format!("no capability mode: {e}")),
    }
    #[cfg(not(target_os = "freebsd"))]
    report.lacking.push("no sandbox on this host".into());
    Ok(report)
}

pub fn join() -> Result<(), Error> {
    Ok(())
}
