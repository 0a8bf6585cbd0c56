//! The numbers, and the table of them.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

/// Whose numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Column {
    /// vmm.ko and bhyve.
    Ours,
    /// Linux's KVM under the same devices.
    Kvm,
    /// No hypervisor.
    Bare,
}

impl Column {
    /// All, in the order of the table.
    pub const ALL: [Column; 3] = [Column::Ours, Column::Kvm, Column::Bare];

    /// Its heading.
    pub const fn name(self) -> &'static str {
        match self {
            Column::Ours => "ours",
            Column::Kvm => "KVM",
            Column::Bare => "bare",
        }
    }
}

/// What is measured; the numbers are instructions of host and guest together
/// unless the unit says otherwise.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// Its name in JSON and in the baseline.
    pub name: String,
    /// What it is.
    pub what: String,
    /// The unit.
    pub unit: String,
    /// What was measured.
    pub values: BTreeMap<Column, f64>,
}

/// All of a run.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Results {
    /// In the order in which they were measured first.
    pub rows: Vec<Row>,
}

impl Results {
    /// Notes a number.
    pub fn add(&mut self, column: Column, name: &str, what: &str, unit: &str, value: f64) {
        if let Some(row) = self.rows.iter_mut().find(|r| r.name == name) {
            row.values.insert(column, value);
            return;
        }
        self.rows.push(Row {
            name: name.to_owned(),
            what: what.to_owned(),
            unit: unit.to_owned(),
            values: BTreeMap::from([(column, value)]),
        });
    }

    /// A number.
    pub fn get(&self, column: Column, name: &str) -> Option<f64> {
        self.rows
            .iter()
            .find(|r| r.name == name)
            .and_then(|r| r.values.get(&column).copied())
    }
}

/// What our number should not exceed, where that was decided beforehand.
pub fn bar(name: &str) -> Option<f64> {
    Some(match name {
        "exit_cpuid" => 250.0,
        "exit_rdmsr" => 270.0,
        "exit_out" => 1300.0,
        "first_exit" => 300_000.0,
        "blk_read_4k" => 12_000.0,
        "compile_ratio" => 1.03,
        "compile_disk_ratio" => 1.10,
        _ => return None,
    })
}

/// Thousands apart, or two decimals for what is small and broken.
pub fn number(value: f64) -> String {
    if value.fract() != 0.0 && value < 1000.0 {
        return format!("{value:.2}");
    }
    let digits = format!("{value:.0}");
    let mut out = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

impl fmt::Display for Results {
    /// A table in Markdown.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "| what | unit | ours | KVM | bare | bar |")?;
        writeln!(f, "| --- | --- | ---: | ---: | ---: | ---: |")?;
        for row in &self.rows {
            write!(f, "| {} | {} |", row.what, row.unit)?;
            for column in Column::ALL {
                match row.values.get(&column) {
                    Some(value) => write!(f, " {} |", number(*value))?,
                    None => write!(f, " |")?,
                }
            }
            match bar(&row.name) {
                Some(bar) => writeln!(f, " ≤ {} |", number(bar))?,
                None => writeln!(f, " |")?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_readable() {
        assert_eq!(number(1_234_567.0), "1,234,567");
        assert_eq!(number(999.0), "999");
        assert_eq!(number(1.034), "1.03");
        assert_eq!(number(12_345.6), "12,346");
    }

    #[test]
    fn a_row_collects_its_columns() {
        let mut results = Results::default();
        results.add(Column::Kvm, "exit_cpuid", "CPUID", "instructions", 969.0);
        results.add(Column::Ours, "exit_cpuid", "CPUID", "instructions", 217.0);
        assert_eq!(results.rows.len(), 1);
        assert_eq!(results.get(Column::Ours, "exit_cpuid"), Some(217.0));
        assert!(
            results
                .to_string()
                .contains("| CPUID | instructions | 217 | 969 | | ≤ 250 |")
        );
    }
}
