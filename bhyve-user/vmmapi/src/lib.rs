//! A safe interface to `/dev/vmm/NAME`.
