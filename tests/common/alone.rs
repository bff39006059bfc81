//! Tests that must not share a process.

use std::env;
use std::process::Command;

/// Runs a scenario in a process of its own, with the stand-in driver: what it
/// counts or sets belongs to a process or to a device. `test` is the full name of the test that calls.
#[track_caller]
pub fn alone(test: &str, scenario: impl FnOnce()) {
    const ALONE: &str = "BATCHNORM_TEST_ALONE";
    if env::var_os(ALONE).is_some_and(|name| name == test) {
        return scenario();
    }
    let output = Command::new(env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture"])
        .env(ALONE, test)
        .env("BATCHNORM_TEST_STAND_IN", "1")
        .output()
        .unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    assert!(
        output.status.success() && out.contains("1 passed"),
        "{test}:\n{out}\n{err}"
    );
}
