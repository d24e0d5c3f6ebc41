#!/usr/bin/env python3
"""Compare two GGUF files of one model, as `upcycle quantize` and llama.cpp's own tools write them.

usage: gguf_parity.py OURS THEIRS [REFERENCE]

Prints metadata that differ, tensors that only one has, how many are the same bytes, which have other types, and, against the float tensors of
REFERENCE, the square error of each quantised type in ours relative to theirs. Needs `gguf` (gguf-py of llama.cpp) and numpy.
"""
import sys
from collections import Counter, defaultdict

import numpy as np
from gguf import GGUFReader
from gguf.quants import dequantize


def metadata(reader):
    return {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}


def short(value):
    text = str(value)
    return text if len(text) < 80 else f"{text[:77]}... ({len(value)})"


def main(ours_file, theirs_file, reference_file=None):
    ours, theirs = GGUFReader(ours_file), GGUFReader(theirs_file)
    a, b = metadata(ours), metadata(theirs)
    for key in sorted(key for key in a.keys() | b.keys() if a.get(key) != b.get(key)):
        print(f"metadata {key}: {short(a.get(key))} | {short(b.get(key))}")
    a, b = ({tensor.name: tensor for tensor in reader.tensors} for reader in (ours, theirs))
    print("only ours:", sorted(a.keys() - b.keys()), "only theirs:", sorted(b.keys() - a.keys()))
    reference = {tensor.name: tensor for tensor in GGUFReader(reference_file).tensors} if reference_file else {}
    same, types, errors = 0, Counter(), defaultdict(lambda: np.zeros(3))
    for name in a.keys() & b.keys():
        x, y = a[name], b[name]
        if x.tensor_type != y.tensor_type:
            types[x.tensor_type.name, y.tensor_type.name] += 1
        same += np.array_equal(x.data.view(np.uint8).ravel(), y.data.view(np.uint8).ravel())
        if name in reference and x.tensor_type == y.tensor_type and x.tensor_type.name.startswith("Q"):
            values = dequantize(reference[name].data, reference[name].tensor_type).astype(np.float64).ravel()
            lost = [((dequantize(t.data, t.tensor_type).ravel() - values) ** 2).sum() for t in (x, y)]
            errors[x.tensor_type.name] += [*lost, (values**2).sum()]
    print(f"{same} of {len(a)} tensors are the same bytes; other types (ours, theirs): {dict(types)}")
    for name, (x, y, values) in sorted(errors.items()):
        print(f"{name}: relative error {np.sqrt(x / values):.5f} | {np.sqrt(y / values):.5f}, squares {x / y:.4f}")


if __name__ == "__main__":
    if not 3 <= len(sys.argv) <= 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
