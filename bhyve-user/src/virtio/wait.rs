//! What the thread of a group of queues sleeps on: being unparked, which is
//! cheapest, or poll(2) where the host has something to tell as well.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, Thread};
use std::time::Duration;

use nix::libc::{POLLERR, POLLHUP, POLLIN, POLLNVAL, POLLOUT};
use vmmapi::poll::{poll, pollfd};

/// What a device waits for, filled in before each sleep.
#[derive(Debug, Default)]
pub struct Sources {
    fds: Vec<pollfd>,
    tokens: Vec<usize>,
    timeout: Option<Duration>,
}

/// A source that is ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ready {
    /// What the device called it.
    pub token: usize,
    /// It can be read, or reading would tell that it is at its end or broken.
    pub read: bool,
    /// It can be written, or writing would tell that it is broken.
    pub write: bool,
}

impl Sources {
    /// Waits for a descriptor, called `token`, to become readable or writable.
    pub fn add(&mut self, token: usize, fd: &impl AsRawFd, read: bool, write: bool) {
        let events = if read { POLLIN } else { 0 } | if write { POLLOUT } else { 0 };
        self.fds.push(pollfd {
            fd: fd.as_raw_fd(),
            events,
            revents: 0,
        });
        self.tokens.push(token);
    }

    /// Waits no longer than this.
    pub fn timeout(&mut self, timeout: Duration) {
        self.timeout = Some(self.timeout.map_or(timeout, |t| t.min(timeout)));
    }

    pub(super) fn clear(&mut self) {
        self.fds.clear();
        self.tokens.clear();
        self.timeout = None;
    }
}

/// Where a group's thread sleeps, and how it is woken.
pub enum Sleeper {
    /// Parked.
    Park(OnceLock<Thread>),
    /// In poll(2).
    Poll(Box<Bell>),
}

impl Sleeper {
    /// # Errors
    /// Out of descriptors.
    pub(super) fn new(polls: bool) -> io::Result<Sleeper> {
        Ok(if polls {
            Sleeper::Poll(Box::new(Bell::new()?))
        } else {
            Sleeper::Park(OnceLock::new())
        })
    }

    /// Tells which thread sleeps here.
    pub(super) fn set_thread(&self, thread: &Thread) {
        if let Sleeper::Park(slot) = self {
            let _ = slot.set(thread.clone());
        }
    }

    /// What the kernel can wake it by, where that is what it sleeps on.
    pub(super) fn doorbell(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Sleeper::Poll(bell) => bell.host.doorbell(),
            Sleeper::Park(_) => None,
        }
    }

    /// Wakes it, if it sleeps. The caller has left word of what for before.
    pub(super) fn wake(&self) {
        match self {
            Sleeper::Park(thread) => {
                if let Some(t) = thread.get() {
                    t.unpark();
                }
            }
            Sleeper::Poll(bell) => bell.ring(),
        }
    }

    /// Sleeps until woken.
    pub(super) fn park() {
        thread::park();
    }
}

/// Something that a thread in poll(2) hears.
pub struct Bell {
    host: host::Bell,
    /// The thread sleeps or is about to: only then a ring costs a system call.
    asleep: AtomicBool,
}

impl Bell {
    fn new() -> io::Result<Bell> {
        Ok(Bell {
            host: host::Bell::new()?,
            asleep: AtomicBool::new(false),
        })
    }

    fn ring(&self) {
        if self.asleep.swap(false, Ordering::SeqCst) {
            self.host.ring();
        }
    }

    /// Sleeps until something of `sources` is ready, their time is up or the
    /// bell rings; unless `busy` finds something to do, when it only looks.
    /// Fills `ready`; says whether the time is up, and whether the bell rang.
    pub(super) fn sleep(
        &self,
        sources: &mut Sources,
        ready: &mut Vec<Ready>,
        busy: impl FnOnce() -> bool,
    ) -> (bool, bool) {
        let own = pollfd {
            fd: self.host.fd(),
            events: POLLIN,
            revents: 0,
        };
        sources.fds.push(own);
        // Whoever has work for us writes it down and then looks here; we do
        // it the other way round.
        self.asleep.store(true, Ordering::SeqCst);
        let timeout = if busy() {
            Some(Duration::ZERO)
        } else {
            sources.timeout
        };
        let count = poll(&mut sources.fds, timeout);
        self.asleep.store(false, Ordering::SeqCst);
        // A ring that is still on its way is heard next time.
        let rung = sources.fds.last().is_some_and(|own| own.revents != 0);
        if rung {
            self.host.hush();
        }
        ready.clear();
        let count = match count {
            Ok(n) => n,
            // Out of memory, for one: no reason to spin.
            Err(_) => {
                crate::pause::sleep(Duration::from_millis(10));
                return (false, rung);
            }
        };
        let broken = POLLERR | POLLHUP | POLLNVAL;
        for (fd, &token) in sources.fds.iter().zip(&sources.tokens) {
            if fd.revents != 0 {
                ready.push(Ready {
                    token,
                    read: fd.revents & (POLLIN | broken) != 0,
                    write: fd.revents & (POLLOUT | broken) != 0,
                });
            }
        }
        let late = count == 0 && timeout.is_some() && timeout == sources.timeout;
        (late, rung)
    }
}

#[cfg(target_os = "linux")]
mod host {
    //! An eventfd(2).
    use super::{AsRawFd, BorrowedFd, RawFd, io};
    use nix::sys::eventfd::{EfdFlags, EventFd};
    use std::os::fd::AsFd;

    pub struct Bell(EventFd);

    impl Bell {
        pub fn new() -> io::Result<Bell> {
            let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
            Ok(Bell(EventFd::from_flags(flags)?))
        }
        pub fn fd(&self) -> RawFd {
            self.0.as_fd().as_raw_fd()
        }
        pub fn doorbell(&self) -> Option<BorrowedFd<'_>> {
            Some(self.0.as_fd())
        }
        pub fn ring(&self) {
            // It fails when it is full, and then it rings already.
            let _ = self.0.write(1);
        }
        pub fn hush(&self) {
            let _ = self.0.read();
        }
    }
}

#[cfg(not(target_os = "linux"))]
mod host {
    //! A kqueue(2) with a user's event, which our vmm.ko can signal too.
    use super::{AsRawFd, BorrowedFd, RawFd, io};
    use nix::libc::{timespec, uintptr_t};
    use nix::sys::event::{EvFlags, EventFilter, FilterFlag, KEvent, Kqueue};
    use std::os::fd::AsFd;

    /// The event that `VM_EXT_DOORBELL` is about.
    const IDENT: uintptr_t = vmm_abi::layout::DOORBELL_IDENT;

    pub struct Bell(Kqueue);

    impl Bell {
        pub fn new() -> io::Result<Bell> {
            let bell = Bell(Kqueue::new()?);
            let flags = EvFlags::EV_ADD | EvFlags::EV_CLEAR;
            bell.change(flags, FilterFlag::empty())?;
            Ok(bell)
        }
        fn change(&self, flags: EvFlags, what: FilterFlag) -> nix::Result<usize> {
            let user = EventFilter::EVFILT_USER;
            let event = KEvent::new(IDENT, user, flags, what, 0, 0);
            self.0.kevent(&[event], &mut [], None)
        }
        pub fn fd(&self) -> RawFd {
            self.0.as_fd().as_raw_fd()
        }
        pub fn doorbell(&self) -> Option<BorrowedFd<'_>> {
            Some(self.0.as_fd())
        }
        pub fn ring(&self) {
            // The event is there, so that nothing can be wrong with this.
            let _ = self.change(EvFlags::empty(), FilterFlag::NOTE_TRIGGER);
        }
        pub fn hush(&self) {
            let now = timespec {
                tv_sec: 0,
                tv_nsec: 0,
            };
            let none = KEvent::new(
                IDENT,
                EventFilter::EVFILT_USER,
                EvFlags::empty(),
                FilterFlag::empty(),
                0,
                0,
            );
            let _ = self.0.kevent(&[], &mut [none], Some(now));
        }
    }
}
