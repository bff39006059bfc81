"""What the measuring scripts share: a program of this crate that is timed in turns with another library, and percentiles.

The program reads one JSON request per line on standard input and answers each with one line.
"""
import json
import os
import pathlib
import platform
import subprocess
import sys
import time

SHAPES = ("32x64x56x56", "32x256x14x14", "8x64x112x112")
LAYOUTS = ("nchw", "nhwc")


class Program:
    """A running program that answers requests."""

    def __init__(self, command, **options):
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **options)

    def ask(self, **request):
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RuntimeError(f"the program ended with {self.process.wait()} at the request {request}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"{answer['error']}, at the request {request}")
        return answer

    def close(self):
        self.process.stdin.close()
        if self.process.wait():
            raise RuntimeError(f"the program ended with {self.process.returncode}")


def percentiles(times):
    """Median, 10th and 90th percentile, of the nearest rank."""
    ordered = sorted(times)
    at = lambda share: ordered[round((len(ordered) - 1) * share)]
    return {"median_ms": at(0.5), "p10_ms": at(0.1), "p90_ms": at(0.9), "rounds": len(ordered)}


def positive(text):
    """A number of the command line that must not be 0."""
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


def sizes(shape):
    return tuple(int(size) for size in shape.split("x"))


def commit(root):
    """The commit, and whether files differ from it, other than reports: one is being written."""
    git = lambda *words: subprocess.run(["git", *words], cwd=root, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
    return git("rev-parse", "--short=10", "HEAD") + (" with changes" if git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benches/results") else "")


def processor():
    """The processor's name, its number of cores and its cache, as the system tells them."""
    name, cache = platform.processor() or platform.machine(), ""
    try:
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
        level = pathlib.Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text().strip()
        cache = f", {int(level.rstrip('K')) // 1024} MiB of L3 cache"
    except (OSError, ValueError):
        pass
    return f"{name}, {os.cpu_count()} cores{cache}"


def about(root):
    """What every report says of where it comes from."""
    return {"device": processor(), "date": time.strftime("%Y-%m-%d"), "commit": commit(root)}


def environment(root, name, packages):
    """A virtual environment under the target folder, with these packages; gives its interpreter. Makes it once."""
    # Relative to where cargo is called, as cargo takes it; without `..`, as Python tells where its environment is.
    folder = pathlib.Path(os.path.abspath(root / os.environ.get("CARGO_TARGET_DIR", "target"))) / name
    python, note = folder / "bin" / "python", folder / "installed"
    wanted = "\n".join(packages)
    if not note.exists() or note.read_text() != wanted:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages], check=True)
        note.write_text(wanted)
    return python


def run_in(root, name, packages):
    """Runs this very script again by the interpreter of such an environment, unless it is that already."""
    python = environment(root, name, packages)
    if pathlib.Path(sys.prefix) != python.parent.parent:
        os.execv(python, [str(python), *sys.argv])
