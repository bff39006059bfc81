//! BatchNorm2d for NVIDIA GPUs.
