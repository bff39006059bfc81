//! Tests of the CPU backend against a plain double-precision reference.
