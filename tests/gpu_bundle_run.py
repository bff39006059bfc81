#!/usr/bin/env python3
"""scripts/gpu-bundle-run goes on after a failure and calls nothing passed that did not run: held against bundles of small
programs that behave in every way a real one might.

    python3 tests/gpu_bundle_run.py
"""
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
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


SWEEP = """echo '{"best": 1}' >$2; echo 'swept'"""


class Bundle:
    """A bundle in which everything passes, until a test changes it. Packed anew for every run."""

    def __init__(self, place):
        self.place = pathlib.Path(place)
        self.folder, self.tools, self.temporary = (self.place / name for name in ("files", "tools", "temporary"))
        for folder in (self.folder, self.folder / "tests", self.folder / "steps", self.tools, self.temporary):
            folder.mkdir()
        shutil.copy(ROOT / "scripts" / "gpu-bundle-run", self.place / "run")
        (self.folder / "commit").write_text("0123456\n")
        self.program("quickstart", "echo 'Runs on the GPU: a device.'")
        self.json("fingerprint", FINGERPRINTS)
        self.json("intrinsics", INTRINSICS)
        self.json("large_tensor", LARGE)
        self.program("tests/graph", PASSING_TEST)
        self.program("bench", BENCH)
        self.program("steps/timings", "echo '9 figures'")
        self.program("steps/sweep", SWEEP)
        self.program("../tools/compute-sanitizer", SANITIZER)
        for name, value in (("fingerprint", FINGERPRINTS), ("intrinsics", INTRINSICS)):
            (self.folder / f"stand-in-{name}.json").write_text(json.dumps(value))

    def program(self, name, text):
        path = self.folder / name
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)

    def json(self, name, value):
        self.program(name, f"cat <<'END'\n{json.dumps(value)}\nEND")

    def start(self, *arguments):
        with tarfile.open(self.place / "bundle.tar.xz", "w:xz", preset=0) as archive:
            archive.add(self.folder, ".")
        environment = {**os.environ, "PATH": f"{self.tools}:{os.environ['PATH']}", "TMPDIR": str(self.temporary)}
        return subprocess.Popen([sys.executable, self.place / "run", "--report", "report.json", *arguments], text=True,
                                cwd=self.place, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment)

    def run(self, *arguments):
        """The exit status and every step's status, by name."""
        process = self.start(*arguments)
        self.output, _ = process.communicate()
        return process.returncode, self.statuses()

    def statuses(self):
        self.report = json.loads((self.place / "report.json").read_text())
        return {step["step"]: step["status"] for step in self.report["steps"]}

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
        steps.pop("test candle_cuda")
        self.assertEqual(steps.pop(name), status, self.bundle.output)
        self.assertEqual(set(steps.values()), {"passed"}, steps)
        self.assertEqual(code, 1)
        self.assertFalse(self.bundle.report["passed"])

    def test_all_passes(self):
        code, steps = self.bundle.run()
        # Left out of the bundle by hand.
        self.assertEqual(steps.pop("test candle_cuda"), "not run")
        self.assertEqual(set(steps.values()), {"passed"}, self.bundle.output)
        self.assertEqual(len(steps), 12, steps)
        self.assertEqual(code, 0)
        self.assertTrue(self.bundle.report["finished"] and self.bundle.report["passed"])
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
        self.bundle.program("../tools/compute-sanitizer", SANITIZER.replace("0 hazards", "2 hazards") + "; exit 99")
        code, steps = self.bundle.run()
        self.assertEqual(steps["compute-sanitizer racecheck"], "failed")
        self.assertEqual(code, 1)

    def test_a_sanitizer_that_cannot_attach(self):
        self.bundle.program("../tools/compute-sanitizer", "echo 'Error: no permission'; exit 1")
        _, steps = self.bundle.run()
        tools = [status for name, status in steps.items() if name.startswith("compute-sanitizer")]
        self.assertEqual(tools, ["not run"] * 4)

    def test_a_sanitizer_that_saw_nothing(self):
        self.bundle.program("../tools/compute-sanitizer", "echo '========= ERROR SUMMARY: 0 errors'")
        _, steps = self.bundle.run()
        tools = [status for name, status in steps.items() if name.startswith("compute-sanitizer")]
        self.assertNotIn("passed", tools)

    def test_a_bench_without_figures(self):
        self.bundle.program("bench", "echo 'cuda: nothing was measured: no CUDA driver'")
        self.assert_only("bench", "failed")

    def test_time_that_is_used_up(self):
        self.bundle.program("quickstart", "sleep 30; echo 'Runs on the GPU: a device.'")
        start = time.monotonic()
        code, steps = self.bundle.run("--seconds", "0.5")
        self.assertLess(time.monotonic() - start, 10)
        self.assertEqual(steps.pop("quickstart"), "not run")
        self.assertEqual(set(steps.values()), {"not run"}, steps)
        self.assertEqual(code, 1)

    def test_a_step_takes_nothing_of_those_after_it(self):
        self.bundle.program("../tools/compute-sanitizer", "echo begun; sleep 30")
        code, steps = self.bundle.run("--seconds", "20", "--skip", "quickstart,tests,intrinsics,fingerprints",
                                     "--jobs", "5")
        cut = [name for name, status in steps.items() if status == "cut"]
        self.assertEqual(len(cut), 4, steps)
        self.assertEqual(self.bundle.step(cut[0])["log"], "begun\n")
        for name in ("large tensor", "timings", "sweep", "bench"):
            self.assertEqual(steps[name], "passed", self.bundle.output)
        self.assertEqual(code, 1)

    def test_what_is_cut_leaves_no_process(self):
        mark = self.bundle.place / "mark"
        self.bundle.program("quickstart", f"(sleep 4; touch {mark}) & wait")
        _, steps = self.bundle.run("--seconds", "2", "--only", "quickstart")
        self.assertEqual(steps["quickstart"], "cut")
        time.sleep(4)
        self.assertFalse(mark.exists())

    def test_a_run_that_is_stopped_leaves_a_report(self):
        mark = self.bundle.place / "mark"
        self.bundle.program("tests/graph", f"touch {mark}; sleep 30")
        self.bundle.program("tests/state", PASSING_TEST)
        process = self.bundle.start("--jobs", "1")
        while not mark.exists():
            self.assertIsNone(process.poll())
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=20)
        self.assertNotEqual(process.returncode, 0)
        steps = self.bundle.statuses()
        self.assertEqual(steps.pop("test candle_cuda"), "not run")
        self.assertEqual(steps, {name: "passed" for name in ("quickstart", "intrinsics", "fingerprints")})
        self.assertEqual(list(self.bundle.temporary.iterdir()), [])
        self.assertFalse(self.bundle.report["finished"])
        self.assertNotIn("passed", self.bundle.report)

    def test_nothing_stays_behind(self):
        self.bundle.run()
        self.assertEqual(list(self.bundle.temporary.iterdir()), [])

    def test_programs_run_side_by_side(self):
        # Each ends only where the other has begun.
        for name, other in (("graph", "state"), ("state", "graph")):
            meeting = f"touch {self.bundle.place}/{name}; until [ -e {self.bundle.place}/{other} ]; do sleep 0.1; done"
            self.bundle.program(f"tests/{name}", f"{meeting}\n{PASSING_TEST}")
        _, steps = self.bundle.run("--only", "tests", "--jobs", "2", "--seconds", "20")
        self.assertEqual((steps["test graph"], steps["test state"]), ("passed", "passed"), self.bundle.output)
        for name in ("graph", "state"):
            (self.bundle.place / name).unlink()
        _, steps = self.bundle.run("--only", "tests", "--jobs", "1", "--seconds", "4")
        self.assertEqual((steps["test graph"], steps["test state"]), ("cut", "not run"), self.bundle.output)

    def test_a_library_that_is_missing(self):
        (self.bundle.place / "missing.c").write_text("int f(void) { return 0; }")
        (self.bundle.place / "main.c").write_text("int f(void); int main(void) { return f(); }")
        library, test = self.bundle.place / "libmissing.so", self.bundle.folder / "tests" / "candle_cuda"
        compile = lambda *words: subprocess.run(["cc", *words], cwd=self.bundle.place, check=True)
        compile("-shared", "-fPIC", "-Wl,-soname,libmissing.so.13", "missing.c", "-o", library)
        compile("main.c", library, "-o", test)
        _, steps = self.bundle.run("--only", "tests")
        self.assertEqual(steps["test candle_cuda"], "not run")
        self.assertEqual(self.bundle.step("test candle_cuda")["detail"], "not on this machine: libmissing.so.13")

    def test_a_step_that_breaks_the_script(self):
        (self.bundle.folder / "stand-in-fingerprint.json").unlink()
        self.assert_only("fingerprints", "failed")

    def test_what_is_left_out_by_hand(self):
        code, steps = self.bundle.run("--skip", "sanitizer,bench")
        self.assertEqual((steps["sanitizer"], steps["bench"]), ("not run", "not run"))
        self.assertEqual(code, 0)
        _, steps = self.bundle.run("--only", "quickstart")
        self.assertEqual([name for name, status in steps.items() if status == "passed"], ["quickstart"])
        _, steps = self.bundle.run("--only", "speed")
        self.assertEqual([name for name, status in steps.items() if status == "passed"], ["timings", "sweep", "bench"])
        process = self.bundle.start("--only", "fingerprint")
        self.assertIn("no step or group: fingerprint", process.communicate()[0])

    def test_measuring_programs(self):
        code, steps = self.bundle.run("--only", "sweep")
        self.assertEqual((code, steps["sweep"]), (0, "passed"))
        self.assertEqual(self.bundle.step("sweep")["report"], {"best": 1})
        # Told how long it may take.
        self.bundle.program("steps/sweep", f"echo $4; {SWEEP}; exit 75")
        code, steps = self.bundle.run("--only", "sweep", "--seconds", "100")
        self.assertEqual((code, steps["sweep"], self.bundle.step("sweep")["report"]), (1, "cut", {"best": 1}))
        self.assertTrue(80 <= int(self.bundle.step("sweep")["log"].split()[0]) <= 95)
        self.bundle.program("steps/sweep", "echo 'no peers here'; exit 77")
        self.assert_only("sweep", "not run")
        self.bundle.program("steps/sweep", "echo 'wrong'; exit 3")
        self.assert_only("sweep", "failed")
        self.bundle.program("steps/sweep", f"{SWEEP}; sleep 30")
        _, steps = self.bundle.run("--only", "sweep", "--seconds", "3")
        self.assertEqual((steps["sweep"], self.bundle.step("sweep")["report"]), ("cut", {"best": 1}))

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
