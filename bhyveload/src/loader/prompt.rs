//! The countdown, the menu, the prompt and the pager.

use super::commands::Flow;
use super::{Loader, Outcome, words};
use crate::console::Key;
use crate::error::LoadError;
use std::time::{Duration, Instant};

/// Seconds before booting when nobody says otherwise.
const DELAY: i64 = 10;
/// Longest delay that is believed: a day.
const LONGEST_DELAY: i64 = 86_400;
/// Lines of a page.
const PAGE: usize = 23;
/// Lines that are remembered.
const HISTORY: usize = 100;

const ENTER: [u8; 2] = [b'\r', b'\n'];
const CTRL_C: u8 = 3;
const CTRL_D: u8 = 4;
const CTRL_U: u8 = 0x15;
const CTRL_W: u8 = 0x17;
const ESCAPE: u8 = 0x1b;
const BACKSPACE: [u8; 2] = [8, 0x7f];

/// How a countdown ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Counted {
    /// The time is up.
    Boot,
    /// A key was pressed that is not Enter.
    Key(u8),
}

/// A line that was typed.
enum Typed {
    Line(String),
    /// Control-C.
    Nothing,
    /// There is no more input.
    End,
}

impl Loader<'_> {
    /// From the configuration to the outcome.
    pub(super) fn converse(&mut self) -> Result<Outcome, LoadError> {
        let mut flow = self.first_choice()?;
        let mut history = Vec::new();
        loop {
            match flow {
                Flow::Boot => return Ok(Outcome::Boot(Box::new(self.guest()?))),
                Flow::Leave(status) => return Ok(Outcome::Leave(status)),
                Flow::Next => {}
            }
            flow = self.prompt(&mut history)?;
        }
    }

    fn prompt(&mut self, history: &mut Vec<String>) -> Result<Flow, LoadError> {
        let prompt = self.environment.get("prompt").unwrap_or("OK").to_owned();
        self.print(&format!("{prompt} "))?;
        match self.line(history)? {
            Typed::Nothing => Ok(Flow::Next),
            Typed::End => Err(
                LoadError::new("-c", "input", "has ended at the loader's prompt")
                    .hint("the messages above say why there is one; quit leaves it"),
            ),
            Typed::Line(line) => match self.obey(&line) {
                Ok(flow) => Ok(flow),
                Err(error) => {
                    self.print(&format!("{error}\n"))?;
                    Ok(Flow::Next)
                }
            },
        }
    }

    /// Boots by the configuration; a failure leads to the prompt.
    fn boot_now(&mut self) -> Result<Flow, LoadError> {
        match self.obey("boot") {
            Ok(flow) => Ok(flow),
            Err(error) => {
                self.unload();
                self.print(&format!("{error}\n"))?;
                Ok(Flow::Next)
            }
        }
    }

    /// What `autoboot_delay` says: nothing at all to -1, the prompt to NO.
    fn delay(&self) -> Option<i64> {
        match self.environment.get("autoboot_delay") {
            Some(no) if no.eq_ignore_ascii_case("no") => None,
            Some(text) => Some(text.trim().parse().unwrap_or(DELAY)),
            None => Some(DELAY),
        }
        .map(|seconds| seconds.clamp(-1, LONGEST_DELAY))
    }

    fn first_choice(&mut self) -> Result<Flow, LoadError> {
        let Some(delay) = self.delay() else {
            return Ok(Flow::Next);
        };
        if delay < 0 {
            return self.boot_now();
        }
        if self.says("beastie_disable", "yes") || !self.console.is_terminal() {
            return self.autoboot(delay, None);
        }
        self.menu(delay)
    }

    /// The choices of FreeBSD's menu, by its keys.
    fn menu(&mut self, delay: i64) -> Result<Flow, LoadError> {
        let mut delay = Some(delay);
        loop {
            let yes = |set: bool| if set { "on" } else { "off" };
            let (single, verbose) = (self.is_on("boot_single"), self.is_on("boot_verbose"));
            let mode = if single { "Single" } else { "Multi" };
            self.print(&format!(
                "\n  1. Boot {mode} user [Enter]\n  2. Boot Single user\n  \
                 3. Escape to loader prompt\n  4. Reboot\n  \
                 5. Verbose: {}\n  6. Single user: {}\n",
                yes(verbose),
                yes(single)
            ))?;
            let key = match delay.take() {
                Some(seconds) => match self.count(seconds, "Autoboot")? {
                    Counted::Boot => b'\r',
                    Counted::Key(key) => key,
                },
                None => {
                    self.print("Choice: ")?;
                    match self.console.key(None)? {
                        Key::Byte(key) => key,
                        Key::Timeout => continue,
                        Key::End => b'3',
                    }
                }
            };
            self.print("\n")?;
            match key {
                b'1' | b'\r' | b'\n' | b'b' | b'B' => return self.boot_now(),
                b'2' => {
                    self.environment.set("boot_single", "YES");
                    return self.boot_now();
                }
                b'3' | ESCAPE | CTRL_C => return Ok(Flow::Next),
                b'4' | b'r' | b'R' => return Ok(Flow::Leave(2)),
                b'5' | b'v' | b'V' => self.toggle("boot_verbose"),
                b'6' | b's' | b'S' => self.toggle("boot_single"),
                _ => {}
            }
        }
    }

    fn is_on(&self, name: &str) -> bool {
        self.environment
            .get(name)
            .is_some_and(|value| !value.eq_ignore_ascii_case("no"))
    }

    fn toggle(&mut self, name: &str) {
        if self.is_on(name) {
            self.environment.remove(name);
        } else {
            self.environment.set(name, "YES");
        }
    }

    /// Counts down until a key is pressed. Where there is no more input, nobody is
    /// there to wait for.
    fn count(&mut self, seconds: i64, what: &str) -> Result<Counted, LoadError> {
        let whole = Duration::from_secs(seconds.unsigned_abs());
        let start = Instant::now();
        self.print(&format!(
            "{what} in {seconds} seconds: Enter boots at once, any other key waits\n"
        ))?;
        loop {
            let left = whole.saturating_sub(start.elapsed());
            match self.console.key(Some(left))? {
                Key::Byte(key) if ENTER.contains(&key) => return Ok(Counted::Boot),
                Key::Byte(key) => return Ok(Counted::Key(key)),
                Key::End => return Ok(Counted::Boot),
                Key::Timeout if left.is_zero() => return Ok(Counted::Boot),
                Key::Timeout => {}
            }
        }
    }

    fn autoboot(&mut self, seconds: i64, prompt: Option<&str>) -> Result<Flow, LoadError> {
        let kernel = match self.files.first() {
            Some(kernel) => kernel.name.clone(),
            None => self
                .environment
                .get("kernel")
                .unwrap_or("kernel")
                .to_owned(),
        };
        let text = match prompt {
            Some(text) => text.to_owned(),
            None => format!("Booting [{kernel}]"),
        };
        match self.count(seconds, &text)? {
            Counted::Boot => self.boot_now(),
            Counted::Key(_) => {
                self.print("\nType '?' for a list of commands, 'help' for more.\n")?;
                Ok(Flow::Next)
            }
        }
    }

    /// `autoboot [seconds [prompt]]`.
    pub(super) fn autoboot_command(&mut self, arguments: &[&str]) -> Result<Flow, LoadError> {
        let seconds = match arguments.first() {
            None => self.delay().unwrap_or(DELAY),
            Some(text) => text
                .parse()
                .map_err(|_| LoadError::new("autoboot", *text, "is no number of seconds"))?,
        };
        if seconds < 0 {
            return self.boot_now();
        }
        self.autoboot(seconds.min(LONGEST_DELAY), arguments.get(1).copied())
    }

    /// Reads a line with the usual keys: backspace, control-U and -W, control-C,
    /// and the arrows for what was typed before.
    fn line(&mut self, history: &mut Vec<String>) -> Result<Typed, LoadError> {
        let mut line = String::new();
        let mut older = 0;
        // How far an escape sequence has come.
        let mut escape = 0;
        loop {
            let key = match self.console.key(None)? {
                Key::Byte(key) => key,
                Key::Timeout => continue,
                Key::End if line.is_empty() => return Ok(Typed::End),
                Key::End => b'\n',
            };
            match (escape, key) {
                (1, b'[' | b'O') => {
                    escape = 2;
                    continue;
                }
                (2, b'A' | b'B') => {
                    older = match key {
                        b'A' => (older + 1).min(history.len()),
                        _ => older.saturating_sub(1),
                    };
                    let replacement = match older {
                        0 => String::new(),
                        n => history[history.len() - n].clone(),
                    };
                    self.erase(&mut line, usize::MAX)?;
                    self.echo(&replacement)?;
                    line = replacement;
                }
                (0 | 1, ESCAPE) => {
                    escape = 1;
                    continue;
                }
                (0, _) => {}
                _ => {
                    escape = 0;
                    continue;
                }
            }
            if escape != 0 {
                escape = 0;
                continue;
            }
            match key {
                key if ENTER.contains(&key) => {
                    self.echo("\n")?;
                    if !line.is_empty() && history.last() != Some(&line) {
                        history.push(line.clone());
                        if history.len() > HISTORY {
                            history.remove(0);
                        }
                    }
                    return Ok(Typed::Line(line));
                }
                CTRL_C => {
                    self.echo("\n")?;
                    return Ok(Typed::Nothing);
                }
                CTRL_D if line.is_empty() => return Ok(Typed::Line("quit".to_owned())),
                CTRL_U => self.erase(&mut line, usize::MAX)?,
                CTRL_W => {
                    let word = line.trim_end().rfind(' ').map_or(0, |at| at + 1);
                    let count = line.len() - word;
                    self.erase(&mut line, count)?;
                }
                key if BACKSPACE.contains(&key) => self.erase(&mut line, 1)?,
                b'\t' | b' '..=b'~' if line.len() < words::LONGEST_LINE => {
                    let c = if key == b'\t' { ' ' } else { char::from(key) };
                    line.push(c);
                    self.echo(c.encode_utf8(&mut [0; 4]))?;
                }
                _ => {}
            }
        }
    }

    /// What is typed comes back where the terminal does not do that itself.
    fn echo(&mut self, text: &str) -> Result<(), LoadError> {
        if self.console.is_terminal() {
            self.print(text)?;
        }
        Ok(())
    }

    fn erase(&mut self, line: &mut String, most: usize) -> Result<(), LoadError> {
        for _ in 0..most {
            if line.pop().is_none() {
                break;
            }
            if self.console.is_terminal() {
                self.console.erase()?;
            }
        }
        Ok(())
    }

    /// Prints text, a page at a time where somebody reads it; says if it was read
    /// to its end.
    pub(super) fn page(&mut self, text: &str) -> Result<bool, LoadError> {
        if !self.console.is_terminal() {
            self.print(text)?;
            return Ok(true);
        }
        let mut left = PAGE;
        let mut lines = text.lines().peekable();
        while let Some(line) = lines.next() {
            self.print(line)?;
            self.print("\n")?;
            left -= 1;
            if left > 0 || lines.peek().is_none() {
                continue;
            }
            const MORE: &str = "--more-- space: page, Enter: line, q: enough";
            self.print(MORE)?;
            left = loop {
                match self.console.key(None)? {
                    Key::Byte(b' ') => break PAGE,
                    Key::Byte(key) if ENTER.contains(&key) => break 1,
                    Key::Byte(b'q' | b'Q' | CTRL_C) | Key::End => break 0,
                    Key::Byte(_) | Key::Timeout => {}
                }
            };
            for _ in 0..MORE.len() {
                self.console.erase()?;
            }
            if left == 0 {
                return Ok(false);
            }
        }
        Ok(true)
    }
}
