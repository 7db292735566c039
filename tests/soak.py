"""Long trials that the test suite leaves out: a run that is killed again and again, and memory over thousands of steps.

    python tests/soak.py kills --count 100      # then the run must end as if nothing had happened, bit for bit
    python tests/soak.py memory --steps 2000    # resident memory of each training loop at a tenth and at the end

Everything is tiny (two layers, 24 images), so that a trial takes seconds and interruptions hit every part of a run: imports,
the first stage, the classifier, the token cache, training, saving (every second step), sampling.
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
sys.path.insert(0, str(ROOT))
PROGRAM = """import sys; sys.path.insert(0, {root!r})
import os, threading, time
import train, evaluate
train.llamagen.SIZES['nano'] = (2, 2, 32)
train.dit.SIZES['nano'] = (2, 32, 2)
train.Shapes.lengths = {{'train': 24, 'val': 16}}
train.SCHEDULES['tokenizer', 'nano']['batch_size'] = 4
train.CLASSIFIER.update(steps=6, batch_size=8)
if os.environ.get('SOAK_MEMORY'):
    def watch(step=[0]):
        log = open(os.environ['SOAK_MEMORY'], 'a')
        take = train.take_step
        def counted(*args):
            take(*args)
            step[0] += 1
            pages = int(open('/proc/self/statm').read().split()[1])
            log.write(f'{{step[0]}} {{pages * 4096}}\\n')
            log.flush()
        train.take_step = counted
    watch()
(evaluate if sys.argv[1] == 'evaluate' else train).main(sys.argv[2:])
"""
FLAGS = ["--size", "nano", "--device", "cpu", "--dtype", "fp32", "--batch-size", "4", "--image-size", "16", "--cooldown", "0",
         "--log-every", "1", "--eval-every", "5"]


def begin(folder, processes, which, *flags, **environment):
    (folder / "program.py").write_text(PROGRAM.format(root=str(ROOT)))
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    return subprocess.Popen([sys.executable, *torchrun, str(folder / "program.py"), which, *map(str, flags)], cwd=ROOT,
                            env={**os.environ, "OMP_NUM_THREADS": "1", **environment}, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True, start_new_session=True)


def descendants(pid):
    """The worker processes of torchrun, or the process itself."""
    children = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout.split()
    return [int(child) for child in children] or [pid]


def kills(count, seed):
    import train
    folder, rng = Path(tempfile.mkdtemp()), random.Random(seed)
    common = [*FLAGS, "--save-every", "2", "--tokenizer-steps", "12", "--steps", "40", "--repa-layer", "1", "--cache-teacher",
              "--cache-dir", folder / "cache"]
    killed, finished, tally, longest = 0, 0, {}, 0.0
    reference, resume = {}, []
    while killed < count or resume:  # the last run is brought to its end
        run, processes = folder / f"run{finished}", 1 + finished % 2
        process = begin(folder, processes, "train", *common, "--out", run, *resume)
        try:  # some come at once, some during the imports, most while something is being done
            process.wait(timeout=rng.uniform(1.0, 14.0) if killed < count else None)
        except subprocess.TimeoutExpired:
            kind = rng.choice(["kill one", "kill all", "SIGTERM", "SIGINT"])
            if kind == "kill one":
                os.kill(rng.choice(descendants(process.pid)), signal.SIGKILL)
            elif kind == "kill all":
                for pid in {*descendants(process.pid), process.pid}:
                    os.kill(pid, signal.SIGKILL)
            elif kind == "SIGINT":  # as a terminal does: to all of them
                os.killpg(process.pid, signal.SIGINT)
            else:
                process.send_signal(signal.SIGTERM)
            killed, tally[kind] = killed + 1, tally.get(kind, 0) + 1
        began = time.perf_counter()
        out, _ = process.communicate(timeout=120)
        longest = max(longest, time.perf_counter() - began)
        for path in run.rglob("ckpt.pt"):
            train.load_checkpoint(path)                                                 # raises if it is not a whole one
        for cache in (folder / "cache").glob("*"):
            if cache.suffix != ".tmp":
                assert len(np.load(cache / "codes.npy")) == len(np.load(cache / "labels.npy"))
        resume = ["--resume"] if (run / "ckpt.pt").exists() else []
        if process.returncode == 0:
            state = train.load_checkpoint(run / "ckpt.pt")
            assert state["step"] == 40
            if processes not in reference:
                whole = begin(folder, processes, "train", *common, "--cache-dir", folder / f"cache-whole{processes}", "--out",
                              folder / f"whole{processes}")
                text, _ = whole.communicate(timeout=300)
                assert whole.returncode == 0, text
                reference[processes] = train.load_checkpoint(folder / f"whole{processes}" / "ckpt.pt")
            for part in ("model", "ema", "projector"):
                for name, value in reference[processes][part].items():
                    assert torch.equal(value, state[part][name]), f"run {finished}: {part} {name} differs from an unbroken run"
            finished, resume = finished + 1, []
            sample(folder, run, rng)
        elif not (out or "").strip() and process.returncode not in (-9, -15, -2):
            raise AssertionError(f"silent exit with {process.returncode}")
        elif "UsageError" in out or "is not a whole checkpoint" in out:
            raise AssertionError(out)
    print(json.dumps({"kills": killed, "kinds": tally, "runs that ended, equal to an unbroken one bit for bit": finished,
                      "longest wait for all processes to end (s)": round(longest, 1)}))


def sample(folder, run, rng):
    """Kill an evaluation at a random moment; the next one must give all samples."""
    flags = [run / "ckpt.pt", "--num-samples", "40", "--device", "cpu", "--save-npz", "--out", run / "eval"]
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
    base = [*FLAGS, "--steps", steps, "--save-every", "500", "--eval-every", "500", "--cache-dir", folder / "cache"]
    for name, flags in {"tokenizer": ["--model", "tokenizer", "--image-size", "24", "--downsample", "2", "--disc-start", "100"],
                        "llamagen": ["--tokenizer-steps", "2", "--repa-layer", "1"],
                        "dit": ["--model", "dit", "--tokenizer-steps", "2", "--repa-layer", "1"]}.items():
        log = folder / f"{name}.txt"
        process = begin(folder, 1, "train", *base, *flags, "--out", folder / name, SOAK_MEMORY=str(log))
        text, _ = process.communicate()
        assert process.returncode == 0, text
        resident = [int(line.split()[1]) / 1e6 for line in log.read_text().splitlines()][-steps:]
        early, late = resident[steps // 10], resident[-1]
        print(f"{name}: {early:.0f} MB at step {steps // 10}, {late:.0f} MB at step {steps}: {late / early - 1:+.1%}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trial", choices=["kills", "memory"])
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    kills(args.count, args.seed) if args.trial == "kills" else memory(args.steps)
