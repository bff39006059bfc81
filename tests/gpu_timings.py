#!/usr/bin/env python3
"""What scripts/gpu-timings reads from ncu's output.

    python3 tests/gpu_timings.py
"""
import importlib.machinery
import importlib.util
import pathlib
import sys
import unittest

SCRIPTS = pathlib.Path(__file__).resolve().parent.parent / "scripts"


def script(name):
    """A script without a suffix, as a module."""
    sys.path.insert(0, str(SCRIPTS))
    loader = importlib.machinery.SourceFileLoader(name.replace("-", "_"), str(SCRIPTS / name))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
    loader.exec_module(module)
    return module


timings = script("gpu-timings")


def csv(*rows):
    head = "==PROF== Connected to process 1\n" + '"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"\n'
    return head + "".join(",".join(f'"{field}"' for field in row) + "\n" for row in rows)


def launch(number, kernel, read, written, *more):
    rows = [("dram__bytes_read.sum", read), ("dram__bytes_write.sum", written), *more]
    return [(number, kernel, metric, "", value) for metric, value in rows]


class CountedInLastCall(unittest.TestCase):
    def test_bytes_are_those_of_the_last_launches_together(self):
        output = csv(*launch(0, "fill", "9,999", "9"), *launch(9, "statistics", "1,000", "8"), *launch(10, "apply", "500", "64"))
        counted = timings.counted_in_last_call(output, 2)
        self.assertEqual((counted["read"], counted["written"]), (1500.0, 72.0))
        self.assertEqual(counted["kernels"], ["statistics", "apply"])
        self.assertEqual(counted["waits"], [{}, {}])

    def test_each_launch_has_its_own_waits(self):
        reason = timings.STALLS[-1]
        output = csv(*launch(1, "statistics", "1", "1", (reason, "2.5")), *launch(2, "apply", "1", "1", (reason, "0.25")))
        self.assertEqual(timings.counted_in_last_call(output, 2)["waits"], [{reason: 2.5}, {reason: 0.25}])

    def test_what_ncu_says_instead_is_the_error(self):
        with self.assertRaisesRegex(ValueError, "ERR_NVGPUCTRPERM"):
            timings.counted_in_last_call("==PROF== Connected\n==ERROR== ERR_NVGPUCTRPERM\n", 1)
        with self.assertRaisesRegex(ValueError, "nothing"):
            timings.counted_in_last_call("", 1)


if __name__ == "__main__":
    unittest.main()
