#!/usr/bin/env python3
"""Compare composed checkpoints: two directories with each other, or one directory with the formulas it should follow.

usage: compare_mergekit.py dirs A B [--gate-cos C]
           every tensor of A and B, byte for byte, after mapping all layouts (classic per-expert names, transformers-5
           fused experts) to one set of names; also lists config.json differences.
       compare_mergekit.py recipe RECIPE.yml DIR [--seed N] [--gate-precision bf16|f32] [--gate-cos C]
                           [--ignore-residual-scale]
           shared tensors and expert MLPs must be byte-equal to their sources (x residual_scale, then cast);
           gates are recomputed here with torch and transformers from the recipe's prompts.

Gates pass when byte-equal, or when every row's cosine is at least C (default 0.999; 1 demands equal bytes).
`--gate-precision f32` runs the base in float32 instead of bfloat16 (what mergekit-moe does).
`--ignore-residual-scale`: mergekit 0.1.4's Mixtral output leaves residual_scale out.
`noise_scale` is not reproduced: experts with it are only compared in shape. Exit 1 on any difference.
"""
import argparse, glob, json, re, sys
import torch
import yaml
from safetensors import safe_open

MLP = ("gate_proj", "up_proj", "down_proj")
W_NAMES = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


# ---------- reading ----------

def read(folder):
    """{name: tensor} of all shards."""
    out = {}
    for path in sorted(glob.glob(f"{folder}/*.safetensors")):
        with safe_open(path, "pt") as f:
            for k in f.keys(): out[k] = f.get_tensor(k)
    if not out: sys.exit(f"error: no safetensors in {folder}")
    return out


def canonical(state):
    """Any layout -> `layers.i.router`, `layers.i.expert.e.gate_proj`, `layers.i.shared.gate_proj`; the rest unchanged."""
    out = {}
    for name, t in state.items():
        m = re.match(r"model\.layers\.(\d+)\.(?:mlp|block_sparse_moe)\.(.+)", name)
        if not m or re.fullmatch(r"(gate|up|down)_proj\.weight", m[2]):
            out[name] = t
            continue
        layer, leaf = f"layers.{m[1]}", m[2].removesuffix(".weight")
        if leaf == "gate": out[f"{layer}.router"] = t
        elif leaf == "shared_expert_gate": out[f"{layer}.shared_router"] = t
        elif leaf == "experts.gate_up_proj":
            for e, both in enumerate(t):
                out[f"{layer}.expert.{e}.gate_proj"], out[f"{layer}.expert.{e}.up_proj"] = both.chunk(2)
        elif leaf == "experts.down_proj":
            for e, down in enumerate(t): out[f"{layer}.expert.{e}.down_proj"] = down
        elif leaf.startswith("experts."):
            _, e, part = leaf.split(".")
            out[f"{layer}.expert.{e}.{W_NAMES.get(part, part)}"] = t
        else:
            out[f"{layer}.shared.{leaf.split('.')[-1]}"] = t
    return out


# ---------- expected tensors ----------

def path_of(ref):
    ref = ref["model"] if isinstance(ref, dict) else ref
    return ref["path"] if isinstance(ref, dict) else ref


def dtype_of(recipe, base):
    config = json.load(open(f"{base}/config.json"))
    name = recipe.get("dtype") or config.get("dtype") or config["torch_dtype"]
    return getattr(torch, name.removeprefix("torch."))


def expected(recipe, ignore_residual):
    """{canonical name: tensor} of everything but the gates, plus the set of names that carry noise."""
    base = path_of(recipe["base_model"])
    dtype, noisy = dtype_of(recipe, base), set()
    out = {k: v.to(dtype) for k, v in read(base).items() if ".mlp." not in k}
    shared = recipe.get("shared_experts") or []
    slots = [("expert.%d" % i, e) for i, e in enumerate(recipe["experts"])] + [("shared", e) for e in shared]
    for slot, expert in slots:
        for name, t in read(path_of(expert["source_model"])).items():
            m = re.match(r"model\.layers\.(\d+)\.mlp\.(\w+)\.weight", name)
            if not m: continue
            target = f"layers.{m[1]}.{slot}.{m[2]}"
            if expert.get("noise_scale"): noisy.add(target)
            if m[2] == "down_proj" and expert.get("residual_scale") is not None and not ignore_residual:
                t = t * expert["residual_scale"]
            out[target] = t.to(dtype)
    if shared:
        for name in [n for n in out if re.search(r"self_attn\.[qkv]_proj\.weight", n)]:
            bias = name.replace(".weight", ".bias")
            out.setdefault(bias, torch.zeros(out[name].shape[0], dtype=dtype))
    return out, noisy


# ---------- expected gates ----------

def tokenize(tokenizer, prompts):
    texts = [(tokenizer.bos_token or "") + p for p in prompts]
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.bos_token or tokenizer.eos_token
    return tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)


def hidden_states(model, tokenizer, prompts, average):
    """[L, H]: what enters each decoder layer, at the last position or averaged over the padded length, mean of prompts."""
    batch = tokenize(tokenizer, prompts)
    states = model(**batch, output_hidden_states=True, use_cache=False).hidden_states[:-1]
    picked = [s.sum(dim=1) / s.shape[1] if average else s[:, -1] for s in states]
    return torch.stack([p.sum(dim=0) / len(prompts) for p in picked])


def embedding_sum(embedding, tokenizer, prompts):
    batch = tokenize(tokenizer, prompts)
    counts = torch.zeros(embedding.shape[0])
    counts.scatter_add_(0, batch["input_ids"].flatten(), batch["attention_mask"].flatten().float())
    return torch.nn.functional.normalize(counts @ embedding, dim=-1)


def unit(v): return v / v.norm(p=2, dim=-1, keepdim=True).clamp(min=1e-8)


@torch.no_grad()
def expected_gates(recipe, seed, precision):
    """[L, E+S, H] before the cast to the output dtype."""
    base, mode = path_of(recipe["base_model"]), recipe.get("gate_mode", "hidden")
    config = json.load(open(f"{base}/config.json"))
    layers, width = config["num_hidden_layers"], config["hidden_size"]
    everyone = recipe["experts"] + (recipe.get("shared_experts") or [])
    if "random" in mode:
        if seed is None: sys.exit("error: a random gate can only be compared with --seed")
        torch.manual_seed(seed)
        shape = (layers, len(everyone), width)
        if mode == "random": return torch.randn(shape)
        a = width ** -0.5
        return torch.rand(shape) * 2 * a - a
    from transformers import AutoModelForCausalLM, AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = []
    if mode == "cheap_embed":
        embedding = read(base)["model.embed_tokens.weight"].float()
        vector = lambda prompts: embedding_sum(embedding, tokenizer, prompts).expand(layers, width)
    else:
        dtype = dict(bf16=torch.bfloat16, f32=torch.float32)[precision]
        model = AutoModelForCausalLM.from_pretrained(base, torch_dtype=dtype).eval()
        vector = lambda prompts: hidden_states(model, tokenizer, prompts, mode == "hidden_avg")
    for expert in everyone:
        v = vector(expert["positive_prompts"])
        if expert.get("negative_prompts"): v = v - vector(expert["negative_prompts"])
        rows.append(unit(v))
    return torch.stack(rows, dim=1)


# ---------- comparing ----------

def same_bytes(a, b):
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def report(got, want, gate_cos, only_shape=()):
    """Print every difference; True if nothing worse than the gate tolerance."""
    ok, equal, gates = True, 0, []
    for name in sorted(got.keys() | want.keys()):
        if name not in got or name not in want:
            print(f"  {name}: only in the {'first' if name in got else 'second'}")
            ok = False
        elif same_bytes(got[name], want[name]): equal += 1
        elif got[name].shape != want[name].shape or (got[name].dtype != want[name].dtype):
            print(f"  {name}: {got[name].dtype}{list(got[name].shape)} against {want[name].dtype}{list(want[name].shape)}")
            ok = False
        elif name in only_shape: print(f"  {name}: has noise, only the shape was compared")
        else:
            a, b = got[name].float(), want[name].float()
            cos = torch.nn.functional.cosine_similarity(a.reshape(-1, a.shape[-1]), b.reshape(-1, a.shape[-1])).min().item()
            gate = name.endswith("router")
            print(f"  {name}: max |difference| {(a - b).abs().max():.3e}, smallest row cosine {cos:.6f}")
            if gate: gates.append(cos)
            if not gate or cos < gate_cos: ok = False
    print(f"  {equal} of {len(got.keys() | want.keys())} tensors are byte-equal" + (f"; gates' smallest cosine {min(gates):.6f}" if gates else ""))
    return ok


def compare_dirs(a, b, gate_cos):
    ca, cb = (json.load(open(f"{d}/config.json")) for d in (a, b))
    for k in sorted(ca.keys() | cb.keys()):
        if ca.get(k, "(absent)") != cb.get(k, "(absent)"): print(f"  config {k}: {ca.get(k, '(absent)')} | {cb.get(k, '(absent)')}")
    return report(canonical(read(a)), canonical(read(b)), gate_cos)


def compare_recipe(a):
    recipe = yaml.safe_load(open(a.recipe))
    got = canonical(read(a.dir))
    want, noisy = expected(recipe, a.ignore_residual_scale)
    gates, experts = expected_gates(recipe, a.seed, a.gate_precision), len(recipe["experts"])
    dtype = next(t.dtype for n, t in want.items() if n.endswith("embed_tokens.weight"))
    for i, g in enumerate(gates.to(dtype)):
        want[f"layers.{i}.router"] = g[:experts]
        if f"layers.{i}.shared_router" in got: want[f"layers.{i}.shared_router"] = g[experts:]
    return report(got, want, a.gate_cos, noisy)


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = ap.add_subparsers(dest="mode", required=True)
    d = modes.add_parser("dirs"); d.add_argument("a"); d.add_argument("b")
    r = modes.add_parser("recipe"); r.add_argument("recipe"); r.add_argument("dir")
    r.add_argument("--seed", type=int); r.add_argument("--gate-precision", choices=["bf16", "f32"], default="bf16")
    r.add_argument("--ignore-residual-scale", action="store_true")
    for p in (d, r): p.add_argument("--gate-cos", type=float, default=0.999)
    a = ap.parse_args()
    ok = compare_dirs(a.a, a.b, a.gate_cos) if a.mode == "dirs" else compare_recipe(a)
    print("same" if ok else "DIFFERENT")
    sys.exit(not ok)


if __name__ == "__main__":
    main()
