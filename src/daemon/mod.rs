//! `cwkill daemon`: sweeps at intervals, exports what it saw, and closes by policy. `commands::daemon` has the loop that joins the parts.
//!
//! [`config`]: the files of the configuration; [`policy`]: what each policy would close, and whether it may. [`observation`] counts what a
//! sweep has found, by cause, age and owner. [`metrics`] puts the numbers of the last sweep into Prometheus' text format, [`http`] serves it,
//! [`textfile`] writes it for node_exporter. [`listener`] opens the address to listen on. [`systemd`] tells the service manager how the
//! daemon is. [`alarm`] waits for the next sweep or a signal. [`lock`] makes sure that there is one daemon.

pub mod alarm;
pub mod config;
pub mod http;
pub mod listener;
pub mod lock;
pub mod metrics;
pub mod observation;
pub mod policy;
pub mod systemd;
pub mod textfile;
