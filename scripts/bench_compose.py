#!/usr/bin/env python3
"""Time composing a checkpoint: `cp` of the same bytes, `upcycle compose`, and any number of `mergekit-moe`s.

usage: bench_compose.py RECIPE WORKDIR --upcycle BIN [--mergekit LABEL=BIN ...] [--rounds 7] [--seed 42] [--cold FOLDER ...]
                        [--also LABEL='COMMAND with {recipe} and {out}' ...] [--json RAW.json]

A round runs every command once, in an order drawn anew, so that neither a busy moment of the machine nor the state that
one command leaves memory in always falls on the same one. Every run writes into an empty folder under WORKDIR, removed after it; the disk is synced between runs, outside
the clock. `cp` copies what the first command wrote in an untimed warm-up, which also brings the sources into the page
cache; with `--cold` the files under those folders (the sources) are dropped from it before every run. Like is compared with like: everybody runs once
with `sync` of what is written (upcycle does that itself) and once without (`upcycle compose --no-sync`), except for commands given with --also. Wall
time is until the process exits; CPU is user + system; memory is the highest anonymous memory sampled, which leaves out the mapped pages of sources.
Prints a markdown table (medians, beside `cp`'s with or without sync as well; range of the wall times; highest peak).
"""
import argparse, json, os, platform, random, shlex, shutil, statistics, subprocess, sys, threading, time


def anonymous(pid):
    """MiB of the own memory of a process and its children; 0 when it has gone."""
    try:
        with open(f"/proc/{pid}/status") as f:
            own = next((int(line.split()[1]) / 1024 for line in f if line.startswith("RssAnon")), 0)
        with open(f"/proc/{pid}/task/{pid}/children") as f:
            return own + sum(anonymous(child) for child in f.read().split())
    except OSError:
        return 0


def timed(command, log):
    """One run: (wall s, CPU s, peak anonymous MiB). Exits when the command fails."""
    peak, done = [0.0], threading.Event()

    def sample(pid):
        while not done.wait(0.005): peak[0] = max(peak[0], anonymous(pid))

    with open(log, "w") as out:
        start = time.perf_counter()
        child = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
        sampler = threading.Thread(target=sample, args=(child.pid,))
        sampler.start()
        _, status, usage = os.wait4(child.pid, 0)
        wall = time.perf_counter() - start
    done.set()
    sampler.join()
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        sys.exit(f"error: {shlex.join(command)} exited {child.returncode}\n" + "".join(open(log).readlines()[-15:]))
    return wall, usage.ru_utime + usage.ru_stime, peak[0]


def empty(folder):
    shutil.rmtree(folder, ignore_errors=True)
    os.sync()


def evict(folder):
    """Takes a folder's files out of the page cache."""
    for d, _, files in os.walk(folder):
        for name in files:
            fd = os.open(os.path.join(d, name), os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def size_of(folder):
    return sum(os.path.getsize(os.path.join(d, f)) for d, _, files in os.walk(folder) for f in files)


def labelled(text):
    label, _, value = text.partition("=")
    if not value: sys.exit(f"error: expected LABEL=VALUE, found {text!r}")
    return label, value


def table(runs, out_bytes, rounds):
    median = lambda label, i: statistics.median(r[i] for r in runs[label])
    lines = [f"{out_bytes / 1e6:.0f} MB written; {rounds} interleaved rounds; {os.cpu_count()} CPUs ({platform.machine()}), "
             f"1-minute load {os.getloadavg()[0]:.1f} at the end", "",
             "| command | wall s, median (range) | x cp | CPU s | x cp | own memory MiB |", "|---|---|---|---|---|---|"]
    for label, rs in runs.items():
        cp = "cp + sync" if "sync" in label and "no-sync" not in label else "cp"
        wall = [r[0] for r in rs]
        m, c = median(label, 0), median(label, 1)
        lines.append(f"| {label} | {m:.2f} ({min(wall):.2f}-{max(wall):.2f}) | {m / median(cp, 0):.2f} | {c:.2f} | {c / median(cp, 1):.1f} | {max(r[2] for r in rs):.0f} |")
    return "\n".join(lines)


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("recipe"); ap.add_argument("workdir")
    ap.add_argument("--upcycle"); ap.add_argument("--mergekit", action="append", default=[])
    ap.add_argument("--also", action="append", default=[]); ap.add_argument("--rounds", type=int, default=7)
    ap.add_argument("--seed", type=int, default=42); ap.add_argument("--json"); ap.add_argument("--cold", nargs="+", default=[])
    a = ap.parse_args()
    os.makedirs(a.workdir, exist_ok=True)
    out, model, log = (os.path.join(a.workdir, n) for n in ("out", "same-bytes", "log.txt"))
    commands = {}
    synced = lambda command: ["sh", "-c", f"{shlex.join(command)} && sync {shlex.quote(out)}/*"]
    if a.upcycle:
        ours = [a.upcycle, "compose", a.recipe, out]
        commands |= {"upcycle compose --no-sync": [*ours, "--no-sync"], "upcycle compose (syncs)": ours}
    for label, binary in map(labelled, a.mergekit):
        theirs = [binary, a.recipe, out, "--random-seed", str(a.seed)]
        commands |= {label: theirs, f"{label} + sync": synced(theirs)}
    for label, text in map(labelled, a.also):
        commands[label] = [w.format(recipe=a.recipe, out=out) for w in shlex.split(text)]
    if not commands: sys.exit("error: nothing to time; give --upcycle, --mergekit or --also")

    for i, command in enumerate(commands.values()):
        empty(out)
        timed(command, log)
        if i == 0:
            shutil.rmtree(model, ignore_errors=True)
            shutil.move(out, model)
    cp = ["cp", "-r", "--reflink=never", model, out]
    commands = {"cp": cp, "cp + sync": synced(cp), **commands}
    runs = {label: [] for label in commands}
    shuffled = random.Random(a.seed)
    for n in range(a.rounds):
        for label in shuffled.sample(list(commands), len(commands)):
            empty(out)
            for folder in a.cold and [*a.cold, model]: evict(folder)
            runs[label].append(timed(commands[label], log))
            print(f"round {n + 1} {label}: {runs[label][-1][0]:.2f} s", file=sys.stderr, flush=True)
    print(table(runs, size_of(model), a.rounds))
    if a.json:
        with open(a.json, "w") as f: json.dump(dict(unit="wall s, cpu s, peak anonymous MiB", runs=runs), f, indent=2)
    empty(out)
    empty(model)


if __name__ == "__main__":
    main()
