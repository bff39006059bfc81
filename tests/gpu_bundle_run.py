#!/usr/bin/env python3
"""scripts/gpu-bundle-run goes on after a failure and calls nothing passed that did not run: held against bundles of small
programs that behave in every way a real one might.

    python3 tests/gpu_bundle_run.py
"""
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import unittest

ROOT = pathlib.Path(__file__).resolve().parent.parent
FINGERPRINTS = {"device": "a device", "cases": {"case": {"plans": ["plan"], "results": {"y": "1", "dx": "2"}}}}
INTRINSICS = {"driver": "real", "intrinsics": {"fma": {"results": 8, "hashes": ["a", "b"]}}, "not_run": {}}
LARGE = {"driver": "real", "elements": 3 << 30, "beyond_2_31": True, "cases": [{"samples": 9, "wide_index": True}]}
PASSING_TEST = """echo 'CUDA tests run on the real driver'
echo 'test result: ok. 3 passed; 0 failed; 0 ignored'"""
SANITIZER = """echo '"plans"'; case "$*" in
*racecheck*) echo '========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)';;
*) echo '========= ERROR SUMMARY: 0 errors';; esac"""
BENCH = """mkdir -p $CRITERION_HOME/a/new
echo '{"full_id": "a", "throughput": {"Bytes": 4}}' >$CRITERION_HOME/a/new/benchmark.json
echo '{"median": {"point_estimate": 2.5}}' >$CRITERION_HOME/a/new/estimates.json"""


class Bundle:
    """A bundle in which everything passes, until a test changes it."""

    def __init__(self, folder):
        self.folder = pathlib.Path(folder)
        self.tools = self.folder / "tools"
        (self.folder / "tests").mkdir()
        (self.folder / "steps").mkdir()
        self.tools.mkdir()
        shutil.copy(ROOT / "scripts" / "gpu-bundle-run", self.folder / "run")
        (self.folder / "commit").write_text("0123456\n")
        self.program("quickstart", "echo 'Runs on the GPU: a device.'")
        self.json("fingerprint", FINGERPRINTS)
        self.json("intrinsics", INTRINSICS)
        self.json("large_tensor", LARGE)
        self.program("tests/graph", PASSING_TEST)
        self.program("bench", BENCH)
        self.program("tools/compute-sanitizer", SANITIZER)
        for name, value in (("fingerprint", FINGERPRINTS), ("intrinsics", INTRINSICS)):
            (self.folder / f"stand-in-{name}.json").write_text(json.dumps(value))

    def program(self, name, text):
        path = self.folder / name
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)

    def json(self, name, value):
        self.program(name, f"cat <<'END'\n{json.dumps(value)}\nEND")

    def run(self, *arguments):
        """The exit status and every step's status, by name."""
        report = self.folder / "report.json"
        path = f"{self.tools}:{os.environ['PATH']}"
        done = subprocess.run([sys.executable, self.folder / "run", "--report", report, *arguments], text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, "PATH": path})
        self.output = done.stdout
        self.report = json.loads(report.read_text())
        return done.returncode, {step["step"]: step["status"] for step in self.report["steps"]}

    def step(self, name):
        return next(step for step in self.report["steps"] if step["step"] == name)


class Run(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.bundle = Bundle(folder.name)

    def assert_only(self, name, status, *arguments):
        """One step has this status, all others have passed, and the exit status says so."""
        code, steps = self.bundle.run(*arguments)
        self.assertEqual(steps.pop(name), status, self.bundle.output)
        self.assertEqual(set(steps.values()), {"passed"}, steps)
        self.assertEqual(code, 1)
        self.assertFalse(self.bundle.report["passed"])

    def test_all_passes(self):
        code, steps = self.bundle.run()
        self.assertEqual(set(steps.values()), {"passed"}, self.bundle.output)
        self.assertEqual(len(steps), 10, steps)
        self.assertEqual(code, 0)
        self.assertEqual(self.bundle.report["kind"], "real driver")
        self.assertEqual(self.bundle.report["commit"], "0123456")
        self.assertIn("graph capture and replay", self.bundle.step("test graph")["detail"])
        self.assertEqual(self.bundle.step("bench")["figures"], {"a": {"median_ns": 2.5, "bytes": 4}})

    def test_cpu_is_no_gpu(self):
        self.bundle.program("quickstart", "echo 'Runs on the CPU, because'")
        self.assert_only("quickstart", "failed")

    def test_a_result_that_differs(self):
        other = json.loads(json.dumps(FINGERPRINTS))
        other["cases"]["case"]["results"]["dx"] = "3"
        self.bundle.json("fingerprint", other)
        self.assert_only("fingerprints", "failed")
        self.assertEqual(self.bundle.step("fingerprints")["different"], ["case: dx"])

    def test_a_device_that_plans_otherwise_proves_nothing(self):
        other = json.loads(json.dumps(FINGERPRINTS))
        other["cases"]["case"]["plans"] = ["another plan"]
        self.bundle.json("fingerprint", other)
        self.assert_only("fingerprints", "not run")

    def test_an_intrinsic_that_differs(self):
        other = json.loads(json.dumps(INTRINSICS))
        other["intrinsics"]["fma"]["hashes"][1] = "c"
        self.bundle.json("intrinsics", other)
        self.assert_only("intrinsics", "failed")
        self.assertEqual(self.bundle.step("intrinsics")["different"], {"fma": [1]})

    def test_an_intrinsic_that_is_missing(self):
        self.bundle.json("intrinsics", {**INTRINSICS, "intrinsics": {}})
        self.assert_only("intrinsics", "failed")

    def test_the_stand_in_is_no_gpu(self):
        self.bundle.json("intrinsics", {**INTRINSICS, "driver": "stand-in"})
        self.assert_only("intrinsics", "failed")
        self.bundle.json("intrinsics", INTRINSICS)
        self.bundle.program("tests/graph", PASSING_TEST.replace("real", "stand-in"))
        self.assert_only("test graph", "failed")

    def test_a_test_that_ran_on_no_driver(self):
        self.bundle.program("tests/graph", PASSING_TEST.splitlines()[1])
        self.assert_only("test graph", "failed")

    def test_a_test_that_fails(self):
        self.bundle.program("tests/graph", "echo 'test result: FAILED. 2 passed; 1 failed; 0 ignored'; exit 101")
        self.assert_only("test graph", "failed")

    def test_a_test_that_dies(self):
        self.bundle.program("tests/graph", "kill -SEGV $$")
        self.assert_only("test graph", "failed")

    def test_a_test_that_is_no_program(self):
        (self.bundle.folder / "tests" / "graph").chmod(0o644)
        self.assert_only("test graph", "not run")

    def test_a_tensor_that_is_not_large(self):
        self.bundle.json("large_tensor", {**LARGE, "beyond_2_31": False})
        self.assert_only("large tensor", "failed")

    def test_a_program_that_fails(self):
        self.bundle.program("large_tensor", "echo 'Error: y[7] is 1, not 2' >&2; exit 1")
        self.assert_only("large tensor", "failed")
        self.assertEqual(self.bundle.step("large tensor")["detail"], "Error: y[7] is 1, not 2")

    def test_sanitizer_errors(self):
        self.bundle.program("tools/compute-sanitizer", SANITIZER.replace("0 hazards", "2 hazards") + "; exit 99")
        code, steps = self.bundle.run()
        self.assertEqual(steps["compute-sanitizer racecheck"], "failed")
        self.assertEqual(code, 1)

    def test_a_sanitizer_that_cannot_attach(self):
        self.bundle.program("tools/compute-sanitizer", "echo 'Error: no permission'; exit 1")
        _, steps = self.bundle.run()
        tools = [status for name, status in steps.items() if name.startswith("compute-sanitizer")]
        self.assertEqual(tools, ["not run"] * 4)

    def test_a_sanitizer_that_saw_nothing(self):
        self.bundle.program("tools/compute-sanitizer", "echo '========= ERROR SUMMARY: 0 errors'")
        _, steps = self.bundle.run()
        tools = [status for name, status in steps.items() if name.startswith("compute-sanitizer")]
        self.assertNotIn("passed", tools)

    def test_a_bench_without_figures(self):
        self.bundle.program("bench", "echo 'cuda: nothing was measured: no CUDA driver'")
        self.assert_only("bench", "failed")

    def test_time_that_is_used_up(self):
        self.bundle.program("quickstart", "sleep 2; echo 'Runs on the GPU: a device.'")
        code, steps = self.bundle.run("--seconds", "1.5")
        self.assertEqual(steps.pop("quickstart"), "failed")
        self.assertEqual(set(steps.values()), {"not run"}, steps)
        self.assertEqual(code, 1)

    def test_a_step_that_breaks_the_script(self):
        (self.bundle.folder / "stand-in-fingerprint.json").unlink()
        self.assert_only("fingerprints", "failed")

    def test_what_is_left_out_by_hand(self):
        code, steps = self.bundle.run("--skip", "sanitizer,bench")
        self.assertEqual((steps["sanitizer"], steps["bench"]), ("not run", "not run"))
        self.assertEqual(code, 0)
        _, steps = self.bundle.run("--only", "quickstart")
        self.assertEqual([name for name, status in steps.items() if status == "passed"], ["quickstart"])

    def test_further_steps(self):
        self.bundle.program("steps/sweep", "echo '{\"best\": 1}' >$2; echo 'swept'")
        (self.bundle.folder / "steps" / "sweep.seconds").write_text("5\n")
        code, steps = self.bundle.run()
        self.assertEqual((code, steps["sweep"]), (0, "passed"))
        self.assertEqual(self.bundle.step("sweep")["report"], {"best": 1})
        self.bundle.program("steps/sweep", "echo 'no peers here'; exit 77")
        self.assert_only("sweep", "not run")
        self.bundle.program("steps/sweep", "echo 'wrong'; exit 3")
        self.assert_only("sweep", "failed")
        self.bundle.program("steps/sweep", "sleep 30")
        (self.bundle.folder / "steps" / "sweep.seconds").write_text("1\n")
        self.assert_only("sweep", "failed")

    def test_a_dry_run_says_so(self):
        self.bundle.json("intrinsics", {**INTRINSICS, "driver": "stand-in"})
        self.bundle.json("large_tensor", {**LARGE, "driver": "stand-in", "beyond_2_31": False})
        self.bundle.program("tests/graph", PASSING_TEST.replace("real", "stand-in"))
        code, steps = self.bundle.run("--stand-in")
        self.assertEqual(code, 0, self.bundle.output)
        self.assertEqual([steps[name] for name in ("quickstart", "compute-sanitizer", "bench")], ["not run"] * 3)
        self.assertIn("proves nothing of a GPU", self.bundle.report["kind"])
        self.assertEqual({step["driver"] for step in self.bundle.report["steps"]}, {"stand-in"})
        self.assertIn("none on a GPU", self.bundle.output)


if __name__ == "__main__":
    unittest.main()
