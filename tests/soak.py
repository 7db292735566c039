"""Long trials that the tests leave out: a run that is killed again and again, and memory.

    python tests/soak.py kills --count 100     # the run must end as if nothing had happened
    python tests/soak.py memory --steps 2000   # resident memory at a tenth and at the end

Everything is tiny (see conftest.shrink), so that a trial takes seconds and interruptions hit every
part of a run: imports, stage one, the classifier, the token cache, training, saving (every second
step), sampling.
"""
import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
PROGRAM = """import os, sys
sys.path[:0] = {paths!r}
import conftest, evaluate, pytest, train
conftest.shrink(pytest.MonkeyPatch())
if "SOAK_MEMORY" in os.environ:
    log, update = open(os.environ["SOAK_MEMORY"], "a"), train.update_ema
    def counted(*args):
        update(*args)
        pages = int(open("/proc/self/statm").read().split()[1])
        print(pages * 4096, file=log, flush=True)
    train.update_ema = counted
(evaluate if sys.argv[1] == "evaluate" else train).main(sys.argv[2:])
"""
FLAGS = ["--device", "cpu", "--dtype", "fp32", "--batch-size", "4", "--image-size", "16",
         "--cooldown", "0", "--log-every", "1", "--eval-every", "5"]


def begin(folder, processes, which, *flags, **environment):
    launcher = folder / "program.py"
    launcher.write_text(PROGRAM.format(paths=sys.path[:2]))
    torchrun = []
    if processes > 1:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *torchrun, str(launcher), which, *map(str, flags)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            env={**os.environ, "OMP_NUM_THREADS": "1", **environment}, text=True,
                            start_new_session=True)


def descendants(pid):
    """The worker processes of torchrun, or the process itself."""
    children = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout
    return [int(child) for child in children.split()] or [pid]


def interrupt(process, kind, rng):
    if kind == "kill one":
        os.kill(rng.choice(descendants(process.pid)), signal.SIGKILL)
    elif kind == "kill all":
        for pid in {*descendants(process.pid), process.pid}:
            os.kill(pid, signal.SIGKILL)
    elif kind == "SIGINT":  # as a terminal does: to all of them
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.send_signal(signal.SIGTERM)


def kills(count, seed):
    import train
    folder, rng = Path(tempfile.mkdtemp()), random.Random(seed)
    common = [*FLAGS, "--save-every", "2", "--tokenizer-steps", "12", "--steps", "40",
              "--repa-layer", "1"]
    killed, finished, tally, longest = 0, 0, {}, 0.0
    reference, resume = {}, []
    while killed < count or resume:  # the last run is brought to its end
        run, processes = folder / f"run{finished}", 1 + finished % 2
        process = begin(folder, processes, "train", *common, "--cache-dir", folder / "cache",
                        "--out", run, *resume)
        try:  # some come at once, some during the imports, most while something is being done
            process.wait(timeout=rng.uniform(1.0, 14.0) if killed < count else None)
        except subprocess.TimeoutExpired:
            kind = rng.choice(["kill one", "kill all", "SIGTERM", "SIGINT"])
            interrupt(process, kind, rng)
            killed, tally[kind] = killed + 1, tally.get(kind, 0) + 1
        began = time.perf_counter()
        out, _ = process.communicate(timeout=120)
        longest = max(longest, time.perf_counter() - began)
        for path in run.rglob("ckpt.pt"):
            train.load_checkpoint(path)  # raises if it is not a whole one
        for path in (folder / "cache").glob("[!.]*.npy"):
            np.load(path)
        resume = ["--resume"] if (run / "ckpt.pt").exists() else []
        if process.returncode == 0:
            if processes not in reference:
                reference[processes] = unbroken(folder, processes, common)
            state = train.load_checkpoint(run / "ckpt.pt")
            assert state["step"] == 40
            for part in ("model", "ema", "projector"):
                for name, value in reference[processes][part].items():
                    assert torch.equal(value, state[part][name]), (
                        f"run {finished}: {part} {name} differs from an unbroken run")
            finished, resume = finished + 1, []
            sample(folder, run, rng)
        elif not (out or "").strip() and process.returncode not in (-9, -15, -2):
            raise AssertionError(f"silent exit with {process.returncode}")
        elif "UsageError" in out or "is not a whole checkpoint" in out:
            raise AssertionError(out)
    print(json.dumps({
        "kills": killed, "kinds": tally,
        "runs that ended, equal to an unbroken one bit for bit": finished,
        "longest wait for all processes to end (s)": round(longest, 1)}))


def unbroken(folder, processes, common):
    """The checkpoint of a run that nothing disturbs."""
    import train
    out, cache = folder / f"whole{processes}", folder / f"cache{processes}"
    process = begin(folder, processes, "train", *common, "--cache-dir", cache, "--out", out)
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 0, text
    return train.load_checkpoint(out / "ckpt.pt")


def sample(folder, run, rng):
    """Kill an evaluation at a random moment; the next one must give all samples."""
    flags = [run / "ckpt.pt", "--num-samples", "40", "--device", "cpu", "--save-npz", "--out",
             run / "eval"]
    process = begin(folder, 1, "evaluate", *flags)
    try:
        process.wait(timeout=rng.uniform(3.0, 6.0))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    process = begin(folder, 1, "evaluate", *flags)
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 0, text
    assert np.load(next((run / "eval").glob("*.npz")))["arr_0"].shape == (40, 16, 16, 3)


def memory(steps):
    folder = Path(tempfile.mkdtemp())
    base = [*FLAGS, "--steps", steps, "--save-every", "500", "--eval-every", "500",
            "--cache-dir", folder / "cache"]
    trials = {"tokenizer": ["--model", "tokenizer", "--image-size", "24", "--downsample", "2",
                            "--disc-start", "100"],
              "llamagen": ["--tokenizer-steps", "2", "--repa-layer", "1"],
              "dit": ["--model", "dit", "--tokenizer-steps", "2", "--repa-layer", "1"]}
    for name, flags in trials.items():
        log = folder / f"{name}.txt"
        process = begin(folder, 1, "train", *base, *flags, "--out", folder / name,
                        SOAK_MEMORY=str(log))
        text, _ = process.communicate()
        assert process.returncode == 0, text
        resident = [int(line) / 1e6 for line in log.read_text().splitlines()]
        early, late = resident[len(resident) // 10], resident[-1]
        print(f"{name}: {early:.0f} MB at a tenth, {late:.0f} MB after {steps} steps: "
              f"{late / early - 1:+.1%}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trial", choices=["kills", "memory"])
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.trial == "kills":
        kills(args.count, args.seed)
    else:
        memory(args.steps)
