//! The one error a user sees: which file, which field, what is wrong, what to do.

use std::fmt;

/// Why a file could not be loaded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoadError {
    /// The file (or the VM) at fault, as the user named it.
    pub file: String,
    /// The field of that file, by its name in the format's specification.
    pub field: String,
    /// What is wrong with it.
    pub problem: String,
    /// What the user can do about it, where that is known.
    pub hint: Option<String>,
}

impl LoadError {
    /// An error about `field` of `file`.
    pub fn new(
        file: impl Into<String>,
        field: impl Into<String>,
        problem: impl Into<String>,
    ) -> Self {
        Self {
            file: file.into(),
            field: field.into(),
            problem: problem.into(),
            hint: None,
        }
    }

    /// The same error with advice.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

impl fmt::Display for LoadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}: {}", self.file, self.field, self.problem)?;
        match &self.hint {
            Some(hint) => write!(f, "; {hint}"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for LoadError {}
