#!/usr/bin/env python3
"""Kill `upcycle compose` (SIGKILL) at random moments, let it go on, and hold what it ends with against a run that was left alone.

usage: kill_compose.py RECIPE WORKDIR --upcycle BIN [--kills 100] [--seed 1] [--args '--out-shard-size 500M']

A trial starts with an empty folder and kills run after run, each at a moment drawn from the time that a whole run takes, until one ends
before its moment. After every kill no file under a final name may differ from the whole run's (names with a dot in front are not final),
and at the end every file must be equal. Trials are made until there were KILLS kills. Exits 1 at the first difference.
"""
import argparse, filecmp, os, random, shlex, shutil, subprocess, sys, time


def differing(out, whole, hidden):
    names = os.listdir(out) if os.path.isdir(out) else []
    names = names if hidden else [n for n in names if not n.startswith(".")]
    same = lambda n: os.path.exists(os.path.join(whole, n)) and filecmp.cmp(os.path.join(out, n), os.path.join(whole, n), shallow=False)
    return [n for n in names if not same(n)]


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("recipe"); ap.add_argument("workdir"); ap.add_argument("--upcycle", required=True)
    ap.add_argument("--kills", type=int, default=100); ap.add_argument("--seed", type=int, default=1); ap.add_argument("--args", default="")
    a = ap.parse_args()
    os.makedirs(a.workdir, exist_ok=True)
    out, whole = (os.path.join(a.workdir, n) for n in ("out", "whole"))
    command = lambda to: [a.upcycle, "-q", "compose", a.recipe, to, *shlex.split(a.args)]
    for folder in (out, whole): shutil.rmtree(folder, ignore_errors=True)
    start = time.perf_counter()
    subprocess.run(command(whole), check=True, stderr=subprocess.DEVNULL)
    longest = time.perf_counter() - start
    rng = random.Random(a.seed)
    kills = trials = went_on = 0
    while kills < a.kills:
        shutil.rmtree(out, ignore_errors=True)
        trials += 1
        while True:
            child = subprocess.Popen(command(out), stderr=subprocess.PIPE)
            try:
                child.wait(rng.uniform(0, longest))
            except subprocess.TimeoutExpired:
                child.kill(); child.wait(); kills += 1
                journal = os.path.join(out, ".upcycle-unfinished")
                went_on += os.path.exists(journal) and open(journal).read().count("\n") > 1
                if bad := differing(out, whole, hidden=False): sys.exit(f"error: after kill {kills} final names differ: {bad}")
                continue
            said = child.stderr.read().decode()
            # A kill may come after all is done; then there is a composite, which is not overwritten.
            if child.returncode and "is not empty" not in said: sys.exit(f"error: exit code {child.returncode}: {said}")
            break
        if bad := differing(out, whole, hidden=True): sys.exit(f"error: trial {trials} ended with other files: {bad}")
        if missing := set(os.listdir(whole)) - set(os.listdir(out)): sys.exit(f"error: trial {trials} lacks {missing}")
        print(f"trial {trials}: {kills} kills so far", file=sys.stderr, flush=True)
    print(f"{kills} kills in {trials} trials, {went_on} of them with a journal to go on from (a whole run takes {longest:.2f} s): all ended with the same bytes")
    for folder in (out, whole): shutil.rmtree(folder)


if __name__ == "__main__":
    main()
