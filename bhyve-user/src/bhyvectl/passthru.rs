//! `bhyvectl passthru list`: what of the host's PCI bus a VM can be given.

use std::io::{self, Write};

use serde::Serialize;

use super::{Failure, view};
use crate::pci::passthru::survey::{self, Obstacle, Survey};

/// A line of the list.
#[derive(Debug, Serialize)]
struct Line<'a> {
    /// What the host calls it.
    name: &'a str,
    /// As `-s` takes it.
    bhyve: String,
    /// Vendor and device, hexadecimal.
    id: String,
    kind: &'static str,
    iommu_group: Option<u32>,
    driver: Option<&'a str>,
    /// MSI or MSI-X, where that could be read.
    messages: Option<bool>,
    passable: bool,
    obstacles: Vec<Obstacle>,
}

/// Does it, if the first word is `passthru`.
pub(super) fn run(args: &[String], out: &mut impl Write) -> Option<Result<(), Failure>> {
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    let json = match words.as_slice() {
        ["passthru", "list"] => false,
        ["passthru", "list", "--json"] => true,
        ["passthru", ..] => {
            let text = format!("passthru list [--json]\n\n{}", view::USAGE);
            return Some(Err(Failure::Usage(text)));
        }
        _ => return None,
    };
    Some(list(json, out))
}

fn list(json: bool, out: &mut impl Write) -> Result<(), Failure> {
    let survey = survey::host().map_err(Failure::Other)?;
    show(&survey, json, out)
}

fn lines(survey: &Survey) -> Vec<Line<'_>> {
    let functions = survey.functions.iter();
    functions
        .map(|f| {
            let obstacles = survey.obstacles(f);
            Line {
                name: &f.name,
                bhyve: f.at.to_string(),
                id: format!("{:04x}:{:04x}", f.id.0, f.id.1),
                kind: f.kind(),
                iommu_group: f.group,
                driver: f.driver.as_deref(),
                messages: f.messages,
                passable: obstacles.is_empty(),
                obstacles,
            }
        })
        .collect()
}

fn show(survey: &Survey, json: bool, out: &mut impl Write) -> Result<(), Failure> {
    let lines = lines(survey);
    if json {
        serde_json::to_writer(&mut *out, &lines).map_err(io::Error::from)?;
        writeln!(out)?;
        return Ok(());
    }
    let width =
        |of: fn(&Line<'_>) -> usize, least| lines.iter().map(of).max().unwrap_or(0).max(least);
    let name = width(|l| l.name.len(), 8);
    let driver = width(|l| l.driver.map_or(0, str::len), 6);
    writeln!(
        out,
        "{:<name$}  {:<8}  {:<9}  {:<13}  {:>5}  {:<driver$}  CAN BE PASSED",
        "FUNCTION", "BHYVE", "ID", "KIND", "GROUP", "DRIVER"
    )?;
    for l in &lines {
        let group = l.iommu_group.map_or("-".into(), |g| g.to_string());
        // What nothing can be done about is said here, the rest below.
        let hopeless = l.obstacles.iter().find(|o| o.commands.is_empty());
        let can = match (hopeless, l.passable) {
            (_, true) => "yes".into(),
            (Some(o), _) => format!("no: {}", o.text),
            (None, _) => "not yet, see below".to_owned(),
        };
        writeln!(
            out,
            "{:<name$}  {:<8}  {:<9}  {:<13}  {group:>5}  {:<driver$}  {can}",
            l.name,
            l.bhyve,
            l.id,
            l.kind,
            l.driver.unwrap_or("-")
        )?;
    }
    let fixable = |l: &&Line<'_>| !l.passable && l.obstacles.iter().all(|o| !o.commands.is_empty());
    for (l, f) in lines
        .iter()
        .zip(&survey.functions)
        .filter(|(l, _)| fixable(l))
    {
        writeln!(out, "\n{}", survey::text(l.name, f.at, &l.obstacles))?;
    }
    writeln!(
        out,
        "\nA VM with such a device needs -S, for bhyveload too: -s SLOT,passthru,BHYVE"
    )?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pci::passthru::survey::Function;
    use vmmapi::host_pci::PciAddress;

    fn function(slot: u8, class: u32, header: u8, driver: &str) -> Function {
        Function {
            at: PciAddress {
                bus: 0,
                slot,
                func: 0,
            },
            name: format!("0000:00:{slot:02x}.0"),
            id: (0x8086, 0x10d3),
            class,
            header,
            driver: (!driver.is_empty()).then(|| driver.to_owned()),
            group: Some(slot.into()),
            messages: Some(true),
            reset: Some(true),
        }
    }

    fn survey() -> Survey {
        Survey {
            functions: vec![
                function(1, 0x06_0400, 1, "pcieport"),
                function(2, 0x02_0000, 0, "e1000e"),
                function(3, 0x01_0802, 0, "ppt"),
            ],
            ppt: true,
            iommu: Some(true),
            ..Survey::default()
        }
    }

    fn shown(json: bool) -> String {
        let mut out = Vec::new();
        show(&survey(), json, &mut out).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn each_function_has_its_line_and_what_to_type() {
        let text = shown(false);
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines[1].contains("no: is a bridge"), "{text}");
        assert!(
            lines[2].contains("network") && lines[2].ends_with("not yet, see below"),
            "{text}"
        );
        assert!(lines[3].ends_with("yes"), "{text}");
        assert!(
            text.contains("0000:00:02.0 (0/2/0) cannot be passed:"),
            "{text}"
        );
        assert!(text.contains("e1000e") && text.contains("-S"));
        assert_eq!(
            text.matches("cannot be passed").count(),
            1,
            "a bridge has no advice"
        );
    }

    #[test]
    fn json_is_one_line_with_all_of_it() {
        let text = shown(true);
        assert_eq!(text.lines().count(), 1);
        let value: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(value[2]["passable"], true);
        assert_eq!(value[1]["obstacles"][0]["kind"], "driver");
        assert_eq!(value[1]["iommu_group"], 2);
        assert!(value[1]["obstacles"][0]["commands"][0].is_string());
    }

    #[test]
    fn other_words_get_the_usage() {
        let args = ["passthru".to_owned(), "lst".to_owned()];
        let failure = run(&args, &mut Vec::new()).unwrap().unwrap_err();
        assert!(failure.to_string().contains("passthru list [--json]"));
        assert!(run(&["list".to_owned()], &mut Vec::new()).is_none());
    }
}
