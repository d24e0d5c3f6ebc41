#!/usr/bin/env python3
"""Make (or re-check) the decoder goldens: tiny random models and what `transformers` computes with them.

usage: goldens.py make  OUT [CASE ...]     write OUT/<case>/{config*.json,model.safetensors,golden.safetensors}
       goldens.py check OUT [CASE ...]     load OUT/<case> with the installed transformers and compare

`make` needs transformers 5 (the fused expert layout is its in-memory layout); `check` runs with 4.5x too, where
fused cases and `config.new.json` are skipped because that version cannot read them.

One directory per case:
  config.json         both spellings of every key that transformers 5 renamed (what `upcycle` itself writes)
  config.old.json     as a 4.x checkpoint spells it: rope_theta, rope_scaling, torch_dtype, num_experts
  config.new.json     as transformers 5.x saves it: rope_parameters, dtype, (qwen3_moe) num_local_experts
  model.safetensors   classic names (one tensor per expert), or fused where the case says so; every value is exactly
                      representable in the stored dtype, and the golden is computed in float32 from those values
  golden.safetensors  L layers, T tokens, D hidden, E experts, V vocabulary; everything float32 but ids and positions
    short.input_ids      [20]         short.logits     [20,V]   one forward, positions 0..19
    short.hidden         [L+1,20,D]   what enters each decoder layer, then the final norm's output
    short.router_logits  [S,20,E]     router logits before softmax, one row per sparse layer (sparse models only)
    long.input_ids       [300]        long.positions [P], long.logits [P,V]: one forward, some positions
    decode.short_last    [V]          last token's logits, short input fed token by token through the KV cache
    decode.long_last     [V]          the same for the long input
    decode.long_tail     [V]          prefill of 280 tokens, then 20 single tokens

For rope kinds `dynamic` and `longrope` the decode.* logits differ from long.logits[-1]: transformers rotates keys with
the frequencies in force when they entered the cache and does not rotate them again when the frequencies change (length
beyond max_position_embeddings, resp. original_max_position_embeddings). An engine that keeps to the one-forward answer
is right by `long.logits`; one that does as transformers does is right by `decode.*`. golden.json records the difference.
"""
import json, os, shutil, sys, tempfile
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DynamicCache

V5 = int(transformers.__version__.split(".")[0]) >= 5
SHORT, LONG, TAIL = 20, 300, 20
POSITIONS = [0, 1, 15, 16, 17, 31, 63, 64, 65, 127, 128, 200, 256, 298, 299]
FORWARD_TOLERANCE = 2e-5  # between two correct float32 forwards of models this small
CLASSIC_MIXTRAL = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}

DENSE = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             hidden_act="silu", max_position_embeddings=512, rms_norm_eps=1e-5, rope_theta=10000.0, vocab_size=128,
             tie_word_embeddings=False, initializer_range=0.02, attention_dropout=0.0, use_cache=True,
             bos_token_id=1, eos_token_id=2)
LLAMA = dict(DENSE, model_type="llama", architectures=["LlamaForCausalLM"], attention_bias=False, mlp_bias=False)
# Two heads of 16: eight frequencies, enough to reach every branch of the scaled kinds.
ROPE = dict(LLAMA, num_attention_heads=2, num_key_value_heads=1, head_dim=16)
MISTRAL = dict(DENSE, model_type="mistral", architectures=["MistralForCausalLM"], head_dim=8, sliding_window=None)
QWEN2 = dict(DENSE, model_type="qwen2", architectures=["Qwen2ForCausalLM"], rope_theta=1000000.0, rms_norm_eps=1e-6,
             use_sliding_window=False, sliding_window=None, max_window_layers=2)
QWEN3 = dict(DENSE, model_type="qwen3", architectures=["Qwen3ForCausalLM"], rope_theta=1000000.0, rms_norm_eps=1e-6,
             head_dim=16, attention_bias=False, use_sliding_window=False, sliding_window=None, max_window_layers=2)
MIXTRAL = dict(DENSE, model_type="mixtral", architectures=["MixtralForCausalLM"], num_local_experts=4,
               num_experts_per_tok=2, sliding_window=None, output_router_logits=False, router_aux_loss_coef=0.001,
               router_jitter_noise=0.0)
QWEN_MOE = dict(num_experts_per_tok=2, moe_intermediate_size=24, decoder_sparse_step=1, mlp_only_layers=[],
                norm_topk_prob=True, output_router_logits=False, router_aux_loss_coef=0.001)
QWEN2_MOE = dict({k: v for k, v in QWEN2.items()}, model_type="qwen2_moe", architectures=["Qwen2MoeForCausalLM"],
                 num_experts=4, shared_expert_intermediate_size=40, qkv_bias=True, **QWEN_MOE)
QWEN3_MOE = dict({k: v for k, v in QWEN3.items() if k != "max_window_layers"}, model_type="qwen3_moe",
                 architectures=["Qwen3MoeForCausalLM"], num_experts=6, **QWEN_MOE)


def scaled(base, rope_scaling, **more):
    """A case whose rope is scaled; `rope_scaling` in the 4.x spelling."""
    return dict(base, rope_scaling=rope_scaling, **more)


# 8 factors per list: head_dim 16 / 2.
SHORT_FACTOR = [1.0, 1.0, 1.05, 1.1, 1.2, 1.35, 1.5, 1.7]
LONG_FACTOR = [1.0, 1.3, 1.9, 2.6, 3.4, 4.2, 5.1, 6.0]
YARN = dict(type="yarn", factor=4.0, original_max_position_embeddings=64)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=64)

# name -> (config in 4.x spelling, stored dtype, fused experts on disk)
CASES = {
    "llama": (dict(LLAMA, num_key_value_heads=4), "float32", False),
    "llama-f16": (dict(LLAMA, num_key_value_heads=4), "float16", False),
    "llama-gqa": (LLAMA, "bfloat16", False),
    "llama-tied": (dict(LLAMA, tie_word_embeddings=True), "bfloat16", False),
    "llama-bias": (dict(LLAMA, attention_bias=True, mlp_bias=True), "bfloat16", False),
    "llama-head-dim": (dict(LLAMA, head_dim=16), "bfloat16", False),
    "llama-odd-sizes": (dict(LLAMA, hidden_size=40, num_attention_heads=5, num_key_value_heads=1, head_dim=6,
                             intermediate_size=51, vocab_size=131), "bfloat16", False),
    "llama-rope-linear": (scaled(ROPE, dict(type="linear", factor=4.0), max_position_embeddings=64), "bfloat16", False),
    "llama-rope-dynamic": (scaled(ROPE, dict(type="dynamic", factor=2.0), max_position_embeddings=64), "bfloat16", False),
    "llama-rope-yarn": (scaled(ROPE, YARN, max_position_embeddings=256), "bfloat16", False),
    "llama-rope-yarn-options": (scaled(ROPE, dict(YARN, beta_fast=8.0, beta_slow=0.5, mscale=0.8, mscale_all_dim=0.4,
                                                  truncate=False), max_position_embeddings=256), "bfloat16", False),
    "llama-rope-yarn-attention": (scaled(ROPE, dict(YARN, attention_factor=0.9), max_position_embeddings=256), "bfloat16", False),
    "llama-rope-longrope": (scaled(ROPE, dict(type="longrope", short_factor=SHORT_FACTOR, long_factor=LONG_FACTOR, factor=4.0),
                                   max_position_embeddings=256, original_max_position_embeddings=64), "bfloat16", False),
    "llama-rope-longrope-attention": (scaled(ROPE, dict(type="longrope", short_factor=SHORT_FACTOR, long_factor=LONG_FACTOR,
                                                        factor=4.0, attention_factor=1.1),
                                             max_position_embeddings=256, original_max_position_embeddings=64), "bfloat16", False),
    "llama-rope-llama3": (scaled(ROPE, LLAMA3, max_position_embeddings=512), "bfloat16", False),
    "mistral": (MISTRAL, "bfloat16", False),
    "mistral-sliding": (dict(MISTRAL, sliding_window=16), "bfloat16", False),
    "qwen2": (QWEN2, "bfloat16", False),
    "qwen2-sliding": (dict(QWEN2, use_sliding_window=True, sliding_window=16, max_window_layers=1), "bfloat16", False),
    "qwen2-yarn": (scaled(dict(QWEN2, num_attention_heads=2, num_key_value_heads=1), YARN,
                          max_position_embeddings=256), "bfloat16", False),
    "qwen3": (QWEN3, "bfloat16", False),
    "qwen3-tied": (dict(QWEN3, tie_word_embeddings=True), "bfloat16", False),
    "mixtral": (MIXTRAL, "bfloat16", False),
    "mixtral-fused": (MIXTRAL, "bfloat16", True),
    "mixtral-sliding": (dict(MIXTRAL, sliding_window=16), "bfloat16", False),
    "mixtral-llama3": (scaled(dict(MIXTRAL, num_attention_heads=2, num_key_value_heads=1, head_dim=16, num_experts_per_tok=1),
                              LLAMA3, max_position_embeddings=512), "bfloat16", False),
    "qwen2-moe": (dict(QWEN2_MOE, norm_topk_prob=False), "bfloat16", False),
    "qwen2-moe-norm": (QWEN2_MOE, "bfloat16", False),
    "qwen2-moe-mlp-only": (dict(QWEN2_MOE, num_hidden_layers=3, mlp_only_layers=[1]), "bfloat16", False),
    "qwen2-moe-step": (dict(QWEN2_MOE, num_hidden_layers=4, decoder_sparse_step=2), "bfloat16", False),
    "qwen2-moe-fused": (QWEN2_MOE, "bfloat16", True),
    "qwen3-moe": (QWEN3_MOE, "bfloat16", False),
    "qwen3-moe-no-norm": (dict(QWEN3_MOE, norm_topk_prob=False, num_experts_per_tok=3), "bfloat16", False),
    "qwen3-moe-fused": (QWEN3_MOE, "bfloat16", True),
}


def draw(name, tensor, g):
    """Weights large enough that every path moves the logits: a wrong one shows up at 1e-2, not at 1e-6."""
    noise = torch.randn(tensor.shape, generator=g)
    if name.endswith("bias"): return noise * 0.3
    if tensor.dim() == 1: return 1.0 + 0.2 * noise
    fan_in = tensor.shape[-1]
    if "embed_tokens" in name: return noise
    if name.endswith(("q_proj.weight", "k_proj.weight")): return noise * 1.4 * fan_in ** -0.5
    if name.endswith(("gate.weight", "expert_gate.weight")): return noise * 1.5 * fan_in ** -0.5
    if name.startswith("lm_head"): return noise * 2.0 * fan_in ** -0.5
    return noise * fan_in ** -0.5


def classic_names(fused, model_type):
    """{fused in-memory name: tensor} -> one tensor per expert, under the names of the original checkpoints."""
    out = {}
    for name, t in fused.items():
        if name.endswith("mlp.experts.gate_up_proj"):
            parts = {"gate_proj": t.chunk(2, dim=1)[0], "up_proj": t.chunk(2, dim=1)[1]}
        elif name.endswith("mlp.experts.down_proj"):
            parts = {"down_proj": t}
        else:
            parts = None
        mixtral = model_type == "mixtral"
        if parts is None:
            out[name.replace(".mlp.gate.", ".block_sparse_moe.gate.") if mixtral else name] = t
            continue
        layer = name.split("mlp.experts.")[0]
        for part, stacked in parts.items():
            for e in range(stacked.shape[0]):
                leaf = f"block_sparse_moe.experts.{e}.{CLASSIC_MIXTRAL[part]}" if mixtral else f"mlp.experts.{e}.{part}"
                out[f"{layer}{leaf}.weight"] = stacked[e].clone()
    return out


def write_configs(cfg, dtype, folder):
    old = dict(cfg, torch_dtype=dtype, transformers_version="4.57.6")
    with open(f"{folder}/config.json", "w") as f: json.dump(old, f)
    from transformers import AutoConfig
    parsed = AutoConfig.from_pretrained(folder)
    parsed.dtype = dtype
    with tempfile.TemporaryDirectory() as tmp:
        parsed.save_pretrained(tmp)
        new = json.load(open(f"{tmp}/config.json"))
    both = dict(new, **old)
    if "num_local_experts" in new and "num_experts" in old: both["num_local_experts"] = new["num_local_experts"]
    if "rope_scaling" in both and "type" in both["rope_scaling"]:
        both["rope_scaling"] = dict(both["rope_scaling"], rope_type=both["rope_scaling"]["type"])
    for spelling, value in {"config.old.json": old, "config.new.json": new, "config.json": both}.items():
        with open(f"{folder}/{spelling}", "w") as f: json.dump(value, f, indent=2, sort_keys=True); f.write("\n")


def load(folder, config="config.json"):
    """The float32 model of `folder` read through one of its config spellings; fails on any key that does not fit."""
    with tempfile.TemporaryDirectory() as tmp:
        shutil.copy(f"{folder}/{config}", f"{tmp}/config.json")
        os.symlink(os.path.abspath(f"{folder}/model.safetensors"), f"{tmp}/model.safetensors")
        model, info = AutoModelForCausalLM.from_pretrained(tmp, dtype=torch.float32, attn_implementation="eager",
                                                           output_loading_info=True)
    bad = {k: v for k, v in info.items() if v}
    assert not bad, f"{folder}/{config}: {bad}"
    return model.eval()


@torch.no_grad()
def forward(folder, ids, config="config.json", probe=False):
    model, routers = load(folder, config), []
    hooks = []
    for layer in model.model.layers if probe else []:
        block = getattr(layer, "block_sparse_moe", layer.mlp if hasattr(layer, "mlp") else None)
        if hasattr(block, "gate"):
            hooks.append(block.register_forward_pre_hook(
                lambda m, args: routers.append(args[0].reshape(-1, args[0].shape[-1]) @ m.gate.weight.T)))
    out = model(ids[None], use_cache=False, output_hidden_states=probe)
    if not probe: return out.logits[0]
    return out.logits[0], torch.cat(out.hidden_states), torch.stack(routers) if routers else None


@torch.no_grad()
def decode(folder, ids, prefill=1, config="config.json"):
    # A fresh model per run: `dynamic` rope keeps the longest length it has seen.
    model = load(folder, config)
    cache = DynamicCache(config=model.config)
    logits = model(ids[None, :prefill], past_key_values=cache, use_cache=True).logits
    for t in range(prefill, len(ids)):
        logits = model(ids[None, t:t + 1], past_key_values=cache, use_cache=True).logits
    return logits[0, -1]


def goldens_of(folder, ids, config="config.json"):
    short, long = ids[:SHORT], ids
    logits, hidden, routers = forward(folder, short, config, probe=True)
    out = {"short.input_ids": short, "short.logits": logits, "short.hidden": hidden,
           "long.input_ids": long, "long.positions": torch.tensor(POSITIONS),
           "long.logits": forward(folder, long, config)[POSITIONS],
           "decode.short_last": decode(folder, short, config=config),
           "decode.long_last": decode(folder, long, config=config),
           "decode.long_tail": decode(folder, long, LONG - TAIL, config)}
    if routers is not None: out["short.router_logits"] = routers
    return {k: v.contiguous().clone() for k, v in out.items()}


def router_margin(folder, ids):
    """Smallest gap between the last chosen and the first rejected expert: too small and rounding picks another one."""
    _, _, routers = forward(folder, ids, probe=True)
    if routers is None: return float("inf")
    k = json.load(open(f"{folder}/config.old.json"))["num_experts_per_tok"]
    top = routers.topk(k + 1, dim=-1).values
    return (top[..., k - 1] - top[..., k]).min().item()


def make(name, out, seed=1):
    cfg, dtype, fused = CASES[name]
    folder = f"{out}/{name}"
    os.makedirs(folder, exist_ok=True)
    write_configs(cfg, dtype, folder)
    from transformers import AutoConfig
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    for seed in range(seed, seed + 50):
        g = torch.Generator().manual_seed(seed)
        state = {n: draw(n, t, g).to(getattr(torch, dtype)) for n, t in sorted(model.state_dict().items())}
        if cfg["tie_word_embeddings"]:
            del state["lm_head.weight"]
            state["model.embed_tokens.weight"] = state["model.embed_tokens.weight"] / 2
        ids = torch.randint(3, cfg["vocab_size"], (LONG,), generator=g)
        save_file(state if fused else classic_names(state, cfg["model_type"]), f"{folder}/model.safetensors",
                  metadata={"format": "pt"})
        if router_margin(folder, ids) > 3e-4: break
    else:
        raise SystemExit(f"{name}: no seed keeps the routing clear of ties")
    golden = goldens_of(folder, ids)
    save_file(golden, f"{folder}/golden.safetensors")
    last = golden["long.logits"][-1]
    meta = dict(transformers=transformers.__version__, torch=torch.__version__, seed=seed, router_margin=router_margin(folder, ids),
                decode_vs_forward=dict(short=diff(golden["decode.short_last"], golden["short.logits"][-1]),
                                       long=diff(golden["decode.long_last"], last), tail=diff(golden["decode.long_tail"], last)))
    with open(f"{folder}/golden.json", "w") as f: json.dump(meta, f, indent=2); f.write("\n")
    rope = (cfg.get("rope_scaling") or {}).get("type")
    if rope not in ("dynamic", "longrope"):
        assert max(meta["decode_vs_forward"].values()) < FORWARD_TOLERANCE, meta
    size = sum(os.path.getsize(f"{folder}/{f}") for f in os.listdir(folder))
    print(f"{name:32} seed {seed} {size // 1024:4} KiB  decode-forward {meta['decode_vs_forward']['long']:.1e}"
          f"  logits std {last.std():.2f}", flush=True)


def diff(a, b): return (a - b).abs().max().item()


def check(name, out):
    folder, (cfg, _, fused) = f"{out}/{name}", CASES[name]
    if fused and not V5: return print(f"{name:32} skipped: fused layout")
    want = load_file(f"{folder}/golden.safetensors")
    for config in ["config.json", "config.old.json"] + (["config.new.json"] if V5 else []):
        got = goldens_of(folder, want["long.input_ids"], config)
        worst = max((diff(got[k].float(), want[k].float()), k) for k in want)
        print(f"{name:32} {config:16} max diff {worst[0]:.1e} ({worst[1]}){'' if worst[0] < FORWARD_TOLERANCE else '  <-- DIFFERS'}", flush=True)


def main():
    if len(sys.argv) < 3 or sys.argv[1] not in ("make", "check"): raise SystemExit(__doc__)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for name in sys.argv[3:] or CASES:
        (make if sys.argv[1] == "make" else check)(name, sys.argv[2])


if __name__ == "__main__":
    main()
