#!/usr/bin/env python3
"""Make PyPI's CUDA build of torch importable on a CPU-only machine without its gigabytes of nvidia wheels.

usage: pip install --no-deps torch
       torch_cpu_stubs.py SITE_PACKAGES/torch/lib

Builds one small library that defines every CUDA symbol torch's libraries leave undefined, and empty libraries with
the SONAMEs they ask for. A stub returns 100 (cudaErrorNoDevice), a pointer to a text where the caller wants a text,
and success where torch asks a harmless question even with no device. Needs gcc and binutils; may be run again.
"""
import glob, os, re, subprocess, sys

STUBS = "libcustubs.so"
CUDA_LIBRARY = re.compile(r"^lib(cu|nccl|nvrtc|nvshmem|nvJit|nvTools|cudnn|cupti)")
CUDA_SYMBOL = re.compile(r"^(cu|__cu|nccl|nvrtc|nvshmem|nvJit|cudnn|cupti|nvtx|_nv)")
TEXT = re.compile(r"(Error|Result|Status)(String|Name)$|GetLastErrorString|VersionString", re.I)
# transformers asks whether a CUDA graph is being captured on every forward; the answer variable starts out as "no".
SUCCESS = re.compile(r"^(__cu|cudaStreamIsCapturing)")


def run(*command):
    return subprocess.run(command, capture_output=True, text=True).stdout


def main():
    if len(sys.argv) != 2: raise SystemExit(__doc__)
    os.chdir(sys.argv[1])
    libraries = [f for f in glob.glob("lib*.so*") if f != STUBS]
    needed_by = {f: re.findall(r"NEEDED.*\[(.*?)\]", run("readelf", "-d", f)) for f in libraries}
    earlier = [f for f in libraries if needed_by[f] == [STUBS]]
    for f in earlier: os.remove(f)
    libraries = [f for f in libraries if f not in earlier]
    needed = {n for f in libraries for n in needed_by[f] if CUDA_LIBRARY.match(n) and n not in libraries}

    undefined, defined = set(), set()
    for f in libraries:
        for line in run("nm", "-D", "--without-symbol-versions", f).splitlines():
            fields = line.split()
            if len(fields) == 2 and fields[0] == "U": undefined.add(fields[1])
            elif len(fields) == 3: defined.add(fields[2])
    symbols = sorted(s for s in undefined - defined if CUDA_SYMBOL.match(s))

    with open("stubs.s", "w") as out:
        out.write('.section .rodata\nmessage: .string "no CUDA device (stub library)"\n.text\n')
        for s in symbols:
            body = "leaq message(%rip),%rax" if TEXT.search(s) else f"movl ${0 if SUCCESS.match(s) else 100},%eax"
            out.write(f".globl {s}\n.type {s},@function\n{s}:\n {body}\n ret\n.size {s},.-{s}\n")
        out.write('.section .note.GNU-stack,"",@progbits\n')
    # The symbols live under a name nobody asks for: ld.so asserts when a *versioned* reference to, say,
    # libcudart.so.13 is met by an unversioned definition in a library of that very name.
    subprocess.check_call(["gcc", "-shared", "-nostdlib", f"-Wl,-soname,{STUBS}", "-o", STUBS, "stubs.s"])
    with open("empty.s", "w") as out: out.write('.section .note.GNU-stack,"",@progbits\n')
    for n in needed:
        subprocess.check_call(["gcc", "-shared", "-nostdlib", "-Wl,--no-as-needed", f"-Wl,-soname,{n}",
                               "-Wl,-rpath,$ORIGIN", "-o", n, "empty.s", "-L.", "-l:" + STUBS])
    os.remove("stubs.s"); os.remove("empty.s")
    print(f"{len(symbols)} stub symbols, {len(needed)} stub libraries")


if __name__ == "__main__":
    main()
