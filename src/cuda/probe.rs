//! Is there a driver, a device, NVRTC?

/// Why CUDA cannot be used.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Unavailable {
    /// placeholder
    #[error("placeholder")]
    Placeholder,
}
