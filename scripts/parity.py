#!/usr/bin/env python3
"""Does transformers load an upcycle output whole, and compute the same logits?

usage: parity.py load DIR
           load DIR with transformers; fail on missing, unexpected or mismatched keys and on any loading warning
       parity.py ids DIR OUT.json --prompt TEXT [--prompt TEXT ...] [--chat]
           token ids for `upcycle inspect DIR --logits`: a JSON list of ids (one prompt) or list of lists
       parity.py logits DIR IDS.json LOGITS.safetensors [--dtype float32|bfloat16] [--max-abs 1e-3] [--min-cos 0.999]
           also run the ids and compare with LOGITS.safetensors: tensor `logits` [T,V] float32 (or `logits.0`, `logits.1`
           ... for a list of lists); prints max |difference|, smallest cosine over positions, and agreement of the argmax
       parity.py dump DIR IDS.json OUT.safetensors
           write transformers' float32 logits in that same form
       parity.py generate DIR --prompt TEXT [--tokens 32]
           greedy text, to look at
       parity.py perplexity DIR --text DOMAIN=FILE [--text ...] [--window 256] [--windows 24]
           perplexity of each text and their geometric mean, on the windows that `upcycle eval` reads

Run it under both transformers 4.5x and 5.x: what is written must load in both. Logits are compared in float32 by
default: the weights are upcast, so the two sides differ by rounding only. Exit 1 when a check fails.
"""
import argparse, json, logging, math, sys, warnings
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

HARMLESS = ("`torch_dtype` is deprecated", "deprecated")


class Collect(logging.Handler):
    def __init__(self):
        super().__init__(logging.WARNING)
        self.messages = []

    def emit(self, record): self.messages.append(record.getMessage())


def load(folder, dtype):
    """The model; exits 1 with the reasons when anything did not fit or transformers had something to say."""
    said = Collect()
    logging.getLogger("transformers").addHandler(said)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            model, info = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=dtype, output_loading_info=True)
        except Exception as e:
            sys.exit(f"error: transformers {transformers.__version__} cannot load {folder}\n  {type(e).__name__}: {e}")
    problems = [f"{kind}: {sorted(map(str, keys))}" for kind, keys in info.items() if keys]
    texts = said.messages + [str(w.message) for w in caught]
    problems += [f"warning: {t}" for t in texts if not any(h in t for h in HARMLESS)]
    print(f"transformers {transformers.__version__}: {type(model).__name__}, {sum(p.numel() for p in model.parameters())} parameters")
    for p in problems: print(f"  {p}")
    if problems: sys.exit(1)
    return model.eval()


def as_lists(ids): return ids if ids and isinstance(ids[0], list) else [ids]


@torch.no_grad()
def compare_logits(a):
    model = load(a.dir, getattr(torch, a.dtype))
    batches, theirs = as_lists(json.load(open(a.ids))), load_file(a.logits)
    worst_abs, worst_cos, agree, total = 0.0, 1.0, 0, 0
    for i, ids in enumerate(batches):
        want = model(torch.tensor([ids]), use_cache=False).logits[0].float()
        name = f"logits.{i}" if f"logits.{i}" in theirs else "logits"
        got = theirs[name]
        if got.shape != want.shape: sys.exit(f"error: {name} is {list(got.shape)}, transformers gives {list(want.shape)}")
        if got.dtype != torch.float32: sys.exit(f"error: {name} is {got.dtype}, expected float32")
        gap = (got - want).abs().max().item()
        cos = torch.nn.functional.cosine_similarity(got, want, dim=-1).min().item()
        same = (got.argmax(-1) == want.argmax(-1)).sum().item()
        print(f"  {name}: {len(ids)} tokens, max |difference| {gap:.3e} (logits' std {want.std():.2f}), "
              f"smallest cosine {cos:.7f}, same argmax {same}/{len(ids)}")
        worst_abs, worst_cos, agree, total = max(worst_abs, gap), min(worst_cos, cos), agree + same, total + len(ids)
    ok = worst_abs <= a.max_abs and worst_cos >= a.min_cos
    print(f"{'same' if ok else 'DIFFERENT'}: max |difference| {worst_abs:.3e}, min cosine {worst_cos:.7f}, argmax {agree}/{total}")
    return ok


@torch.no_grad()
def dump(a):
    model, batches = load(a.dir, torch.float32), as_lists(json.load(open(a.ids)))
    logits = [model(torch.tensor([ids]), use_cache=False).logits[0].contiguous() for ids in batches]
    save_file({f"logits.{i}": t for i, t in enumerate(logits)} if len(logits) > 1 else {"logits": logits[0]}, a.out)
    return True


def write_ids(a):
    tokenizer = AutoTokenizer.from_pretrained(a.dir)
    def encode(text):
        if not a.chat: return tokenizer(text)["input_ids"]
        chat = tokenizer.apply_chat_template([dict(role="user", content=text)], add_generation_prompt=True, tokenize=False)
        return tokenizer(chat, add_special_tokens=False)["input_ids"]
    ids = [encode(t) for t in a.prompt]
    with open(a.out, "w") as f: json.dump(ids if len(ids) > 1 else ids[0], f)
    return True


@torch.no_grad()
def generate(a):
    model, tokenizer = load(a.dir, torch.float32), AutoTokenizer.from_pretrained(a.dir)
    for text in a.prompt:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        out = model.generate(ids, max_new_tokens=a.tokens, do_sample=False)[0, ids.shape[1]:]
        print(json.dumps(dict(prompt=text, ids=out.tolist(), text=tokenizer.decode(out)), ensure_ascii=False))
    return True


@torch.no_grad()
def perplexity(a):
    model, tokenizer = load(a.dir, torch.float32), AutoTokenizer.from_pretrained(a.dir)
    # Only a token that the tokenizer puts in front of every text; it is not predicted.
    empty = tokenizer("")["input_ids"]
    logs = []
    for domain, file in (text.split("=", 1) for text in a.text):
        ids = tokenizer(open(file, encoding="utf-8").read(), add_special_tokens=False, verbose=False)["input_ids"]
        cut = [ids[i:i + a.window] for i in range(0, len(ids) - a.window + 1, a.window)]
        count = min(a.windows, len(cut))
        cut = [empty[:1] + cut[i * (len(cut) - 1) // max(1, count - 1)] for i in range(count)]
        total = tokens = 0
        for window in cut:
            x = torch.tensor([window])
            scored = model(x, use_cache=False).logits[0, :-1].float()
            skip = max(len(empty[:1]) - 1, 0)
            losses = torch.nn.functional.cross_entropy(scored, x[0, 1:], reduction="none")[skip:]
            total, tokens = total + losses.double().sum().item(), tokens + len(losses)
        logs.append(total / tokens)
        print(f"{domain}: {math.exp(logs[-1]):.3f}", flush=True)
    print(f"geometric mean: {math.exp(sum(logs) / len(logs)):.3f}")
    return True


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = ap.add_subparsers(dest="mode", required=True)
    p = modes.add_parser("load"); p.add_argument("dir")
    p = modes.add_parser("ids"); p.add_argument("dir"); p.add_argument("out")
    p.add_argument("--prompt", action="append", required=True); p.add_argument("--chat", action="store_true")
    p = modes.add_parser("logits"); p.add_argument("dir"); p.add_argument("ids"); p.add_argument("logits")
    p.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    p.add_argument("--max-abs", type=float, default=1e-3); p.add_argument("--min-cos", type=float, default=0.999)
    p = modes.add_parser("dump"); p.add_argument("dir"); p.add_argument("ids"); p.add_argument("out")
    p = modes.add_parser("generate"); p.add_argument("dir"); p.add_argument("--prompt", action="append", required=True)
    p.add_argument("--tokens", type=int, default=32)
    p = modes.add_parser("perplexity"); p.add_argument("dir"); p.add_argument("--text", action="append", required=True)
    p.add_argument("--window", type=int, default=256); p.add_argument("--windows", type=int, default=24)
    a = ap.parse_args()
    transformers.logging.disable_progress_bar()
    if a.mode == "load": ok = bool(load(a.dir, torch.float32))
    else: ok = dict(ids=write_ids, dump=dump, logits=compare_logits, generate=generate, perplexity=perplexity)[a.mode](a)
    sys.exit(not ok)


if __name__ == "__main__":
    main()
