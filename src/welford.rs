//! The Welford merge on the host.
